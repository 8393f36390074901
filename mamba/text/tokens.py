"""Between text and token ids: a tokenizer, used for nothing but that.

A tokenizer's file may say that every text is padded, or cut to a length. For a prompt that would be
a silent change, so both are left out here.
"""

import copy

__all__ = ["decode", "encode", "plain_tokenizer"]


def plain_tokenizer(tokenizer):
    """A tokenizer of ``transformers`` or ``tokenizers``, without padding and truncation.

    transformers wraps a ``tokenizers.Tokenizer``, and may tidy up spaces when it decodes. A stream
    cannot take back a space that it has shown, so the inner one is used. The caller's is not
    changed: a copy is, if there is something to change.

    Raises:
        TypeError: it is no tokenizer.
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
    return tokenizer


def encode(tokenizer, text, begins):
    """The token ids of a text -> list of int.

    Args:
        tokenizer: a plain one.
        text: a str.
        begins: whether the text begins here; then the special tokens that the tokenizer adds by
            default are added.

    Raises:
        TypeError: the text is no str.
        ValueError: it is not text (bytes of another encoding), or the tokenizer cannot encode it.
    """
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a str, got {type(text).__name__}")
    text.encode()  # raises for what is not text, and says where
    options = {} if begins else {"add_special_tokens": False}
    ids = _call("encode", tokenizer.encode, text, **options)
    return list(getattr(ids, "ids", ids))  # tokenizers' Encoding, or the list itself


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
