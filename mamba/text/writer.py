"""From tokens to text as they come: whole characters only, and nothing from a stop string on."""

from mamba.text.tokens import decode

__all__ = ["TextWriter"]


class TextWriter:
    """Turn the tokens of one text into str, one token at a time.

        writer.write(token)  ->  the text that this token makes certain, perhaps ""
        writer.close()       ->  after the last token: the text that was held back

    What may still change or be cut off is held back: a character some of whose bytes are missing,
    and an ending that a stop string may begin with. Once the text has ended, ``ended_by`` names the
    argument of ``generate`` that did it, "eos_token_id", "stop", or "n_tokens_to_gen" for
    ``close``. Until then it is None. All further text is "". ``ids`` holds the tokens that were
    written, up to the end token or to the token that completes a stop string.

    Several stop strings: the one that is complete first counts, and of those that end together the
    longest. So the text does not depend on how it is split into tokens. They are searched for in
    what is written only, not across the border to the context.

    Args:
        tokenizer: anything that decodes. None: all text is "", and only the tokens count.
        context: the ids before the first token, on which its text may depend.
        ends: the tokens that end the text, which they are no part of.
        stop: the strings that end the text, which they are no part of.
    """

    def __init__(self, tokenizer, context=(), ends=(), stop=()):
        self.tokenizer, self.ends, self.stop = tokenizer, frozenset(ends), tuple(stop)
        self.ids, self.ended_by = [], None
        self._held = ""  # text that may turn out to begin a stop string
        self._begin_window(list(context))

    # A token's text depends on its neighbours (half a character, or a space that only a word's
    # beginning gets), so the new text is the difference of two decodings. It suffices to decode
    # from the text shown last. So every token costs the same, however long the text is.

    def write(self, token):
        """The text that is certain with this token -> str."""
        if self.done:
            return ""
        self.ids.append(token)
        if token in self.ends:
            return self.close("eos_token_id")
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd"):  # an unfinished character
            return ""
        new = text[len(self._shown) :]
        self._begin_window(self._window[self._n_shown :])
        return self._until_stop(new)

    def close(self, ended_by="n_tokens_to_gen"):
        """The rest -> str. An unfinished character becomes what decoding makes of it."""
        if self.done:
            return ""
        text = self._until_stop(self._decode(self._window)[len(self._shown) :])
        if not self.done:
            text, self.ended_by = text + self._held, ended_by
        return text

    @property
    def done(self):
        """Whether the text has ended."""
        return self.ended_by is not None

    def _decode(self, ids):
        return "" if self.tokenizer is None else decode(self.tokenizer, ids)

    def _begin_window(self, ids):
        """Decode from these ids on, whose own text was shown."""
        self._window, self._n_shown, self._shown = ids, len(ids), self._decode(ids)

    def _until_stop(self, new):
        """Add new text to what is held; return all in which no stop string can begin any more."""
        text = self._held + new
        found = [(text.index(s) + len(s), text.index(s)) for s in self.stop if s in text]
        if found:
            self.ended_by = "stop"
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(s.startswith(text[-n:]) for s in self.stop):
                self._held = text[-n:]
                return text[:-n]
        self._held = ""
        return text
