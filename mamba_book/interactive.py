"""Figures that the reader drives, without a script: every frame is in the page, and CSS shows one.

A frame is an ordinary Matplotlib figure. The controls are radio buttons, which a mouse, a finger,
the arrow keys and a screen reader all know how to use, and ``:has(:checked)`` picks the frame. So
nothing is fetched and nothing is executed: the figure works in the book, in Jupyter and in Colab,
offline, on both themes; where even the style is stripped, one frame stands there as a picture.
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
#ID label {display: inline-block; position: relative; margin: 0 .15em .25em 0; cursor: pointer}
#ID input {position: absolute; opacity: 0; margin: 0}
#ID label span {display: block; min-width: 2.2em; padding: .3em .5em; text-align: center;
 border: 1px solid currentColor; border-radius: .4em}
#ID :checked + span {background: #3b8bd055; font-weight: bold}
#ID :focus-visible + span {outline: 3px solid #3b8bd0; outline-offset: 1px}
#ID p {margin: .2em 0 0; min-height: 3em; font-size: .95em}
@supports selector(:has(*)) {#ID .f {display: none}}
@media print {#ID fieldset {display: none}}
"""


def frames(draw, controls, alt, start=None):
    """Display the figures ``draw(*values)`` for every combination of values, one at a time.

    controls: {name: values}, a row of buttons for each; the values are shown as ``str`` has them.
    draw: returns a Matplotlib figure and a sentence that says what this frame shows; the sentence
    stands below the picture and is read out when it changes. ``alt`` describes the whole: what is
    drawn, and what the controls change. start: the values at first, by default the first of each.

    What all frames have in common is written once, so that thirty frames of bars weigh little more
    than one. Ids are made from the words, not from the drawing: the same on every machine.
    Raises ValueError for an empty alt text or sentence, a control without a choice, or a start that
    is not among the values.
    """
    if not alt.strip():
        raise ValueError("an interactive figure needs alt text: what is drawn, what changes it")
    for name, values in controls.items():
        if len(set(map(str, values))) != len(values) or len(values) < 2:
            raise ValueError(f"control {name!r} needs at least two different values, got {values}")
    start = tuple(values[0] for values in controls.values()) if start is None else tuple(start)
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
    rows = []
    for c, (name, values) in enumerate(controls.items()):
        buttons = "".join(
            f'<label><input type="radio" name="{prefix}-{c}" id="{prefix}-{c}-{v}" '
            f'autocomplete="off"{" checked" if value == start[c] else ""}>'
            f"<span>{html.escape(str(value))}</span></label>"
            for v, value in enumerate(values)
        )
        rows.append(f"<fieldset><legend>{html.escape(name)}</legend>{buttons}</fieldset>")
    places = itertools.product(*(range(len(values)) for values in controls.values()))
    for k, place in enumerate(places):
        chosen = "".join(f":has(#ID-{c}-{v}:checked)" for c, v in enumerate(place))
        rules.append(f"#ID{chosen} .f{k} {{display: inline}}")
    said = "".join(
        f'<span class="f f{k}"{"" if choice == start else " hidden"}>{html.escape(note)}</span>'
        for k, (choice, note) in enumerate(zip(choices, notes, strict=True))
    )
    page = (
        f'<div class="book-frames" id="{prefix}"><style>{chr(10).join(rules)}</style>'
        f'{"".join(rows)}{svg}<p aria-live="polite">{said}</p></div>'
    ).replace("#ID", f"#{prefix}")
    display({"text/html": page, "text/plain": f"interactive figure: {alt}"}, raw=True)


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
