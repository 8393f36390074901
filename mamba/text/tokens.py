"""Between text and token ids: a tokenizer, used for nothing but that.

A tokenizer's file may say that every text is padded, or cut to a length. For a prompt that would be
a silent change, so both are left out here.
"""

import base64
import copy
import functools
import json
import math
import numbers

__all__ = ["check_ids", "decode", "encode", "growth", "plain_tokenizer"]

USUAL_GROWTH = 64  # times longer a text may always become
MOST_CHARACTERS = 2**22  # that a text may become by more
DECODER_GROWTH = 256  # times longer a token's text may become


def plain_tokenizer(tokenizer):
    """A tokenizer of ``transformers`` or ``tokenizers``, without padding and truncation.

    transformers wraps a ``tokenizers.Tokenizer``, and may tidy up spaces when it decodes. A stream
    cannot take back a space that it has shown, so the inner one is used. The caller's is not
    changed: a copy is, if there is something to change.

    Raises:
        TypeError: it is no tokenizer.
        ValueError: its decoder may make very much of a character.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not all(hasattr(tokenizer, name) for name in ("encode", "decode", "get_vocab")):
        raise TypeError(
            f"tokenizer must be a tokenizer, as load_tokenizer returns it, got {tokenizer!r:.80}"
        )
    if hasattr(tokenizer, "no_padding") and (tokenizer.padding or tokenizer.truncation):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    if growth(getattr(tokenizer, "decoder", None)) > DECODER_GROWTH:
        raise ValueError(f"the tokenizer's decoder may turn one character into {DECODER_GROWTH}")
    return tokenizer


def growth(part):
    """How many characters a part of a tokenizer may make of one, or how many tokens of one.

    Replacements that follow each other multiply: thirty that double fill any memory. What Unicode's
    normal forms add (18 times, however often) is not counted.

    part: a normalizer, decoder or post-processor of ``tokenizers``; for anything else 1.
    """
    try:
        return _growth_of(bytes(part.__getstate__()))
    except Exception:  # None, or a part that is written in Python
        return 1


@functools.lru_cache(maxsize=8)
def _growth_of(data):
    return _growth(json.loads(data))


def _growth(part):
    inner = [p for key in ("normalizers", "decoders", "processors") for p in part.get(key, ())]
    if inner:
        return math.prod(map(_growth, inner))
    if part["type"] == "Replace":
        added, taken = len(part["content"]), len(part["pattern"].get("String", ""))
        return max(1, -(-added // taken)) if taken else 1 + added  # a pattern may match nothing
    if part["type"] == "Prepend":
        return 1 + len(part["prepend"])
    if part["type"] == "TemplateProcessing":  # the text may stand in it several times
        special = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
        names = [piece.get("SpecialToken", {}).get("id") for piece in part["single"]]
        return sum(special.get(name, 1) for name in names)
    if part["type"] == "Precompiled":  # 4 bytes: the size of an index; the index; strings
        table = base64.b64decode(part["precompiled_charsmap"])
        strings = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
        return max(1, *(len(string.decode(errors="replace")) for string in strings))
    return 4 if part["type"] == "ByteLevel" else 1  # a character for each byte


def encode(tokenizer, text, begins):
    """The token ids of a text -> list of int.

    Args:
        tokenizer: a plain one.
        text: a str.
        begins: whether the text begins here; then the special tokens that the tokenizer adds by
            default are added.

    Raises:
        ValueError: it is not text (bytes of another encoding), or the tokenizer cannot encode it.
    """
    text.encode()  # raises for what is not text, and says where
    times = growth(getattr(tokenizer, "normalizer", None))
    times *= growth(getattr(tokenizer, "post_processor", None))
    if times > USUAL_GROWTH and times * len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"the tokenizer may turn this text of {len(text)} characters into {times * len(text)}"
        )
    options = {} if begins else {"add_special_tokens": False}
    ids = _call("encode", tokenizer.encode, text, **options)
    return list(getattr(ids, "ids", ids))  # tokenizers' Encoding, or the list itself


def check_ids(ids):
    """The token ids of a prompt -> list of int. Raises TypeError for what is no list of integers.

    ids: a list, a tuple or an array
    """
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, list | tuple):
        raise TypeError(f"a prompt must be a str or a list of token ids, got {type(ids).__name__}")
    for id in ids:
        if not isinstance(id, numbers.Integral) or isinstance(id, bool):
            raise TypeError(f"a prompt of token ids must hold integers only, got {id!r:.80}")
    return [int(id) for id in ids]


def decode(tokenizer, ids):
    """The text of token ids, special tokens included. Raises ValueError if it cannot be made."""
    return _call("decode", tokenizer.decode, ids, skip_special_tokens=False)


def _call(verb, method, argument, **options):
    """Call the library; what goes wrong inside it, a panic too, becomes a ValueError."""
    try:
        return method(argument, **options)
    except BaseException as error:  # a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer cannot {verb} this: {error}") from error
