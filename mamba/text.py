"""Tokens -> text as they come: whole characters only, and nothing from a stop string on."""

__all__ = ["TextWriter"]


class TextWriter:
    """Turns the tokens of one text into pieces of str, one token at a time.

    ``write(token)`` -> the text that this token makes certain, perhaps "". Held back is what may
    still change or be cut off: a character some of whose bytes are missing, and an ending that a
    stop string might begin with. ``close()`` -> what was held back, after the last token. ``done``:
    the text has ended (by the end token, a stop string or ``close``), and all further text is "".

    tokenizer: anything that decodes.   context: the ids before the first token, for what the text
    of a token depends on.   eos_token_id: ends the text, without it.   stop: the strings that end
    it, without them. Where several would, the one that is complete first counts, of those that end
    together the longest: so the text does not depend on how it is split into tokens. A stop string
    is looked for in what was written only, not across the border to the context.
    """

    def __init__(self, tokenizer, context=(), eos_token_id=None, stop=()):
        self.tokenizer, self.eos_token_id, self.stop = tokenizer, eos_token_id, tuple(stop)
        self.done = False
        self._held = ""  # text that may turn out to begin a stop string
        self._begin_window(list(context))

    # A token's text depends on its neighbours (half a character, or a space that only a word's
    # beginning gets), so what is new is the difference of two decodings. Decoding from the last
    # shown piece on suffices, and keeps the cost of a token the same however long the text.

    def write(self, token):
        """The text that is certain with this token -> str."""
        if self.done:
            return ""
        if token == self.eos_token_id:
            return self.close()
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd"):  # an unfinished character
            return ""
        piece = text[len(self._shown) :]
        self._begin_window(self._window[self._n_shown :])
        return self._until_stop(piece)

    def close(self):
        """The rest -> str; of an unfinished character, what decoding makes of it."""
        if self.done:
            return ""
        piece = self._until_stop(self._decode(self._window)[len(self._shown) :])
        if not self.done:
            piece, self.done = piece + self._held, True
        return piece

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _begin_window(self, ids):
        """Decode from these ids on, whose own text was shown."""
        self._window, self._n_shown, self._shown = ids, len(ids), self._decode(ids)

    def _until_stop(self, piece):
        """Add a piece to what is held; give out what no stop string can begin in any more."""
        text = self._held + piece
        found = [(text.index(s) + len(s), text.index(s)) for s in self.stop if s in text]
        if found:
            self.done = True
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        for n in range(longest, 0, -1):
            if any(s.startswith(text[-n:]) for s in self.stop):
                self._held = text[-n:]
                return text[:-n]
        self._held = ""
        return text
