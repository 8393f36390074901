"""Figures that the reader drives, without a script: every frame is in the page, and CSS shows one.

A frame is an ordinary Matplotlib figure. The controls are radio buttons, which a mouse, a finger,
the arrow keys and a screen reader all know how to use, and ``:has(:checked)`` picks the frame. So
nothing is fetched and nothing is executed: the figure works in the book, in Jupyter and in Colab,
offline, on both themes; where even the style is stripped, one frame stands there as a picture. A
figure that plays is a CSS animation, with a button to start it and one to stop it where it is; who
asks the system for less motion is not offered it.
"""

import hashlib
import html
import itertools
import json
import re
import xml.etree.ElementTree as ET

from IPython.display import display

from mamba_book.figures import describe_svg, draw_svg

__all__ = ["frames"]

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
ET.register_namespace("", _SVG[1:-1])
ET.register_namespace("xlink", _XLINK[1:-1])

_STYLE = """
#ID {color: var(--pst-color-text-base, inherit); margin: 0 auto; max-width: WIDTHpx}
#ID fieldset {border: 0; margin: 0 0 .4em; padding: 0; min-width: 0}
#ID legend {float: none; width: auto; margin: 0; padding: 0; font-size: .95em}
#ID label {display: inline-block; position: relative; margin: 0 .15em .25em 0; cursor: pointer;
 user-select: none}
#ID input {position: absolute; opacity: 0; margin: 0}
#ID label span {display: block; min-width: 2.2em; padding: .3em .5em; text-align: center;
 border: 1px solid currentColor; border-radius: .4em}
#ID :checked + span {background: #3b8bd055; font-weight: bold}
#ID :focus-visible + span {outline: 3px solid #3b8bd0; outline-offset: 1px}
#ID .track {display: flex; touch-action: pan-y}
#ID .track label {flex: 1 1 0; min-width: 0; margin: 0 0 .25em -1px}
#ID .track span {min-width: 0; padding-inline: 0; border-radius: 0; font-size: .9em}
#ID p {display: grid; margin: .2em 0 0; min-height: 3em; font-size: .95em}
#ID p span {grid-area: 1 / 1}
@supports selector(:has(*)) {#ID .f {display: none}}
@media print {#ID fieldset {display: none}}
"""
_PLAY_STYLE = """
#ID:has(#ID-pause:checked) .f, #ID:has(#ID-pause:checked) span::after {
 animation-play-state: paused !important}
#ID .track span::after {position: absolute; inset: auto 0 0 0; height: 4px; background: #3b8bd0}
@media (prefers-reduced-motion: reduce) {#ID .play {display: none}}
"""
TRACK_FROM = 7  # values: a row of as many is a track without gaps, on which one can drag
HOLD = 2  # frames for which the last picture stays before the first comes again


def frames(draw, controls, alt, start=None, play=None, autoplay=False):
    """Display the figures ``draw(*values)`` for every combination of values, one at a time.

    controls: {name: values}, a row of buttons for each; the values are shown as ``str`` has them.
    draw: returns a Matplotlib figure and a sentence that says what this frame shows; the sentence
    stands below the picture and is read out when it changes. ``alt`` describes the whole: what is
    drawn, and what the controls change. start: the values at first, by default the first of each.
    play: seconds for a frame; the row of the last control then has a button that plays its values
    in order, again and again, and one that stops where it is. autoplay: whether it plays at first.

    What all frames have in common is written once, so that thirty frames of bars weigh little more
    than one. Ids are made from the words, not from the drawing: the same on every machine.
    Raises ValueError for an empty alt text or sentence, a control without a choice, a start that
    is not among the values, frames that follow each other too fast, or autoplay without play.
    """
    if not alt.strip():
        raise ValueError("an interactive figure needs alt text: what is drawn, what changes it")
    for name, values in controls.items():
        if len(set(map(str, values))) != len(values) or len(values) < 2:
            raise ValueError(f"control {name!r} needs at least two different values, got {values}")
    start = tuple(values[0] for values in controls.values()) if start is None else tuple(start)
    if play is not None and play < 0.4:
        raise ValueError(f"play: a frame of {play} s flickers; it needs 0.4 s or more")
    if autoplay and play is None:
        raise ValueError("autoplay needs play, the seconds for a frame")
    choices = list(itertools.product(*controls.values()))
    if start not in choices:
        raise ValueError(f"start {start} is not one of the values of the controls: {controls}")

    drawn, notes = [], []
    for choice in choices:
        fig, note = draw(*choice)
        if not note.strip():
            raise ValueError(f"frame {choice} needs a sentence: what is to be seen in it")
        drawn.append(ET.fromstring(draw_svg(fig)))
        notes.append(note)
    words = json.dumps([alt, {name: list(map(str, v)) for name, v in controls.items()}, notes])
    prefix = "f" + hashlib.sha256(words.encode()).hexdigest()[:8]

    svg = describe_svg(ET.tostring(_merge(drawn, choices.index(start)), "unicode"), alt)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    rules = [_STYLE.strip().replace("WIDTH", re.search(r"max-width: (\d+)px", svg)[1])]
    last = len(controls) - 1
    rows = []
    for c, (name, values) in enumerate(controls.items()):
        plays = play is not None and c == last
        buttons = "".join(
            _button(prefix, c, f"{c}-{v}", value, value == start[c] and not (plays and autoplay))
            for v, value in enumerate(values)
        )
        if len(values) >= TRACK_FROM:
            buttons = f'<div class="track">{buttons}</div>'
        if plays:
            both = [("play", "▶\ufe0e play", autoplay), ("pause", "pause", False)]
            both = "".join(_button(prefix, c, *button) for button in both)
            buttons += f'<div class="play">{both}</div>'
        rows.append(f"<fieldset><legend>{html.escape(name)}</legend>{buttons}</fieldset>")
    places = list(itertools.product(*(range(len(values)) for values in controls.values())))
    for k, place in enumerate(places):
        chosen = "".join(f":has(#ID-{c}-{v}:checked)" for c, v in enumerate(place))
        # Important, because Bootstrap's own rule for what is hidden is.
        rules.append(f"#ID{chosen} .f{k} {{display: inline !important}}")
    if play is not None:
        parts = {f"f f{k}" for k in range(len(choices))}  # the sentences, then the drawing
        parts |= set(re.findall(r'class="(f [^"]+)"', svg))
        still = places[choices.index(start)][last]
        rules += [_PLAY_STYLE.strip(), *_play_rules(places, sorted(parts), play, still)]
    said = "".join(
        f'<span class="f f{k}"{"" if choice == start else " hidden"}>{html.escape(note)}</span>'
        for k, (choice, note) in enumerate(zip(choices, notes, strict=True))
    )
    page = (
        f'<div class="book-frames" id="{prefix}"><style>{chr(10).join(rules)}</style>'
        f'{"".join(rows)}{svg}<p aria-live="polite">{said}</p></div>'
    ).replace("#ID", f"#{prefix}")
    display({"text/html": page, "text/plain": f"interactive figure: {alt}"}, raw=True)


def _button(prefix, row, name, text, checked):
    """A radio button of a row, seen as the text beside it."""
    return (
        f'<label><input type="radio" name="{prefix}-{row}" id="{prefix}-{name}" '
        f'autocomplete="off"{" checked" if checked else ""}>'
        f"<span>{html.escape(str(text))}</span></label>"
    )


def _play_rules(places, parts, seconds, still):
    """The rules by which what is drawn comes and goes while the last row plays.

    Args:
        places: the positions of the buttons, one tuple for each frame.
        parts: the classes of what is drawn, such as "f f0 f3": in which frames it is seen.
        seconds: for a frame.
        still: position in the last row of what is shown instead where motion is not wanted.
    """
    frame = {place: k for k, place in enumerate(places)}
    last, length = len(places[0]) - 1, max(place[-1] for place in places) + 1
    playing = ":has(:is(#ID-play, #ID-pause):checked)"
    names, motion, rest = {}, [], []  # names of the runs: {whether it is seen, at each position}

    def run(seen):
        name = names.setdefault(seen, "book-run-" + "".join(str(int(now)) for now in seen))
        return f"animation: {name} {seconds * (length + HOLD):g}s step-end infinite"

    for v in range(length):  # a mark at the button whose frame is seen
        look = run(tuple(v == other for other in range(length)))
        motion.append(f"#ID{playing} #ID-{last}-{v} + span::after {{content: ''; {look}}}")
    for others in dict.fromkeys(place[:-1] for place in places):
        chosen = "".join(f":has(#ID-{c}-{v}:checked)" for c, v in enumerate(others)) + playing
        rest.append(f"#ID{chosen} .f{frame[*others, still]} {{display: inline !important}}")
        for part in parts:
            seen = tuple(f"f{frame[*others, v]}" in part.split() for v in range(length))
            if any(seen):
                look = f"display: inline !important; {run(seen)}"
                motion.append(f'#ID{chosen} [class="{part}"] {{{look}}}')
    for seen, name in names.items():
        stops = " ".join(
            f"{100 * v / (length + HOLD):.4g}% {{visibility: {'visible' if now else 'hidden'}}}"
            for v, now in enumerate(seen)
            if v == 0 or now != seen[v - 1]
        )
        motion.append(f"@keyframes {name} {{{stops}}}")
    yield f"@media screen and (prefers-reduced-motion: no-preference) {{{chr(10).join(motion)}}}"
    yield f"@media print, (prefers-reduced-motion: reduce) {{{chr(10).join(rest)}}}"


def _merge(drawn, start):
    """One SVG of many: what they share as it is, what differs once per variant, as <g class=f…>.

    Matplotlib repeats its definitions (glyphs, clip paths) where they are first used; here they are
    collected, and ids that nothing refers to are dropped, so that none occurs twice.
    """
    definitions = {}
    for svg in drawn:
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', ET.tostring(svg, "unicode")))
        used = {a or b for a, b in used}
        for parent in list(svg.iter()):
            parent.text = parent.text if parent.tag == _SVG + "style" else None
            parent.tail = None
            for child in [child for child in parent if child.tag == _SVG + "defs"]:
                parent.remove(child)
                for definition in child:
                    definition.tail = None
                    key = definition.get("id") or ET.tostring(definition, "unicode")
                    definitions.setdefault(key, definition)
        for element in svg.iter():
            if element.get("id") not in used:
                element.attrib.pop("id", None)
            for name in ("d", "x", "y", "points"):
                if name in element.attrib:  # hundredths of a point are enough
                    element.set(name, re.sub(r"(\.\d\d)\d+", r"\1", element.get(name)))
    merged = _common(drawn, start)
    defs = ET.Element(_SVG + "defs")
    defs.extend(definitions.values())
    merged.insert(0, defs)
    return merged


def _common(elements, start):
    """The element that these have in common, down to where they differ."""
    first = elements[0]
    written = [ET.tostring(element) for element in elements]
    if len(set(written)) == 1:
        return first
    same = all((e.tag, e.attrib, len(e)) == (first.tag, first.attrib, len(first)) for e in elements)
    if same and len(first):
        merged = ET.Element(first.tag, first.attrib)
        for children in zip(*elements, strict=True):
            child = _common(children, start)
            merged.extend(child if child.tag == "variants" else [child])
        return merged
    variants = ET.Element("variants")
    for text in dict.fromkeys(written):
        frames_with_it = [k for k, other in enumerate(written) if other == text]
        group = ET.SubElement(variants, _SVG + "g")
        group.set("class", " ".join(["f", *(f"f{k}" for k in frames_with_it)]))
        if start not in frames_with_it:
            group.set("display", "none")  # a style sheet overrules this; without one, it holds
        group.append(elements[frames_with_it[0]])
    return variants
