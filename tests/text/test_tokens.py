"""A tokenizer's padding and truncation never change a prompt; what it cannot do is an error."""

import base64
import json

import pytest
from tokenizers import Tokenizer

from mamba.text.tokens import decode, encode, growth, plain_tokenizer

TEXT = "def main():\n    return 1"


def spoiled(tokenizer, **changes):
    """Another tokenizer, as a stranger's file would give it."""
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | changes))


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    "pad", [None, {"length": 64}, {"length": 10**9}, {"pad_to_multiple_of": 8}]
)
def test_padding_and_truncation_are_left_out(tokenizer, pad, truncate):
    other = Tokenizer.from_str(tokenizer.to_str())
    if pad:
        other.enable_padding(**pad)
    if truncate:
        other.enable_truncation(2)
    kept = other.padding, other.truncation
    assert encode(plain_tokenizer(other), TEXT, True) == tokenizer.encode(TEXT).ids
    assert (other.padding, other.truncation) == kept  # the caller's is as it was


def test_a_tokenizer_without_either_is_used_as_it_is(tokenizer):
    assert plain_tokenizer(tokenizer) is tokenizer


def test_generate_reads_the_whole_prompt(tokenizer, pair, go_on, read):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(2)
    other.enable_padding(length=30)
    assert go_on(TEXT, tokenizer=other) == go_on(TEXT, tokenizer=tokenizer)


def test_a_slow_tokenizer_without_those_settings():
    class Slow:
        def encode(self, text, add_special_tokens=True):
            return [7] * add_special_tokens + [ord(c) for c in text]

        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

        def get_vocab(self):
            return {}

    slow = plain_tokenizer(Slow())
    assert encode(slow, "ab", True) == [7, 97, 98] and encode(slow, "ab", False) == [97, 98]
    assert decode(slow, [97, 98]) == "ab"


def test_a_panic_is_an_error_of_one_line(tokenizer, capfd):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    hostile = spoiled(tokenizer, pre_tokenizer=split | {"pattern": {"Regex": "(a+)+$"}})
    with pytest.raises(ValueError, match="^the tokenizer cannot encode this: .*Regex search error"):
        encode(hostile, "a" * 40 + "b", True)


def doubling(times, kind="Replace"):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    key = "decoders" if kind == "decoder" else "normalizers"
    return {"type": "Sequence", key: [replace] * times}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (doubling(10), 2**10),
        ({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "abc"}, 4),
        ({"type": "Replace", "pattern": {"String": "abcd"}, "content": "abc"}, 1),
        ({"type": "Prepend", "prepend": "▁"}, 2),
        ({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}, 1),
        (None, 1),
    ],
)
def test_growth_is_what_a_normalizer_may_do(tokenizer, part, expected):
    changed = spoiled(tokenizer, normalizer=part)
    assert growth(changed.normalizer) == expected
    if part and "Regex" not in str(part):
        assert len(changed.normalizer.normalize_str("a" * 50)) <= 50 * expected


def test_growth_of_a_template_and_of_a_table():
    """Each special token may be many; a table of strings grows a text by its longest."""
    begin = {"id": "x", "ids": [1] * 1000, "tokens": ["a"] * 1000}
    pieces = [{"SpecialToken": {"id": "x", "type_id": 0}}] * 50
    pieces += [{"Sequence": {"id": "A", "type_id": 0}}] * 2
    template = {"type": "TemplateProcessing", "single": pieces, "special_tokens": {"x": begin}}
    assert growth(Stored(template)) == 50 * 1000 + 2
    table = (8).to_bytes(4, "little") + bytes(8) + b"a\0" + "ﷺ".encode() * 18 + b"\0bc\0"
    stored = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    assert growth(Stored(stored)) == 18


class Stored:
    """A part of a tokenizer, as its file describes it."""

    def __init__(self, description):
        self.description = description

    def __getstate__(self):
        return json.dumps(self.description).encode()


def test_growth_of_a_tokenizer_is_bounded(tokenizer):
    """Thirty replacements that double would make a gigabyte of one character."""
    for times in (30, 1000):
        hostile = plain_tokenizer(spoiled(tokenizer, normalizer=doubling(times)))
        with pytest.raises(ValueError, match="^the tokenizer may turn this text of 1 characters"):
            encode(hostile, "a", True)
    with pytest.raises(ValueError, match="decoder may turn one character into 256"):
        plain_tokenizer(spoiled(tokenizer, decoder=doubling(30, "decoder")))
    some = plain_tokenizer(spoiled(tokenizer, normalizer=doubling(3)))
    assert len(encode(some, "a" * 100, True)) == 800
    repeat = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    repeat["single"] = [{"Sequence": {"id": "A", "type_id": 0}}] * 10**5
    hostile = plain_tokenizer(spoiled(tokenizer, post_processor=repeat))
    with pytest.raises(ValueError, match="may turn this text of 100 characters into 10000000"):
        encode(hostile, "a" * 100, True)


def test_interrupts_pass():
    class Stopped:
        def encode(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(Stopped(), "a", True)


def test_an_error_of_the_tokenizer_names_it():
    class Broken:
        def decode(self, ids, skip_special_tokens):
            raise RuntimeError("no such token")

    with pytest.raises(ValueError, match="^the tokenizer cannot decode this: no such token"):
        decode(Broken(), [1])
