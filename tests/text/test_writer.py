"""Text as it comes: whole characters; stop strings, against a search in the whole text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mamba.text.writer import TextWriter
from mamba.train.corpus import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level: a character of several bytes is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


class Strings:
    """A tokenizer whose tokens are any strings."""

    def __init__(self, strings):
        self.strings = strings

    def decode(self, ids, skip_special_tokens):
        return "".join(self.strings[i] for i in ids)


def write(tokenizer, ids, **kwargs):
    """-> the texts, one per token and the one of `close`; whether a token ended the whole text."""
    writer = TextWriter(tokenizer, **kwargs)
    texts = [writer.write(i) for i in ids]
    ended = writer.done
    return [*texts, writer.close()], ended


def test_a_character_is_never_split():
    """Characters of two to four bytes, some several tokens: each whole, at its last token."""
    tokenizer = train_tokenizer(["def main(argv):\n    return argv\n" * 3, "日本 😀 " * 3], 290)
    context, text = "é😀", "日本語 naïve 👩‍👩‍👧 \ufffd! ok"
    ids = tokenizer.encode(text).ids
    assert any(tokenizer.decode([i]) == "\ufffd" for i in ids)
    found, _ = write(tokenizer, ids, context=tokenizer.encode(context).ids)
    assert "".join(found) == text and "" in found[:-1] and found[-1] == ""
    assert not any(t.endswith("\ufffd") for t in found)
    # An unfinished one at the end comes last, as what decoding makes of it.
    half = tokenizer.encode("ok 🦀").ids[:-1]
    found, _ = write(tokenizer, half)
    assert "".join(found) == tokenizer.decode(half) == "ok \ufffd"
    assert found[-1].endswith("\ufffd")


def test_a_word_keeps_its_space():
    """A SentencePiece-like decoder drops the first space: only the first of the whole text."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert write(tokenizer, [2, 3, 1, 2], context=[1])[0] == [" cat", "s", " the", " cat", ""]


def cut(text, stops):
    """The definition: the shortest beginning that ends in a stop string, without that string."""
    for end in range(1, len(text) + 1):
        ends = [len(s) for s in stops if text[:end].endswith(s)]
        if ends:
            return text[: end - max(ends)], True
    return text, False


def test_the_text_ends_before_the_stop_string():
    tokenizer = Strings(["one", " two", " three", "\n\n", "four"])
    ids = [0, 1, 2, 3, 4]
    assert write(tokenizer, ids, stop=["\n\n"]) == (["one", " two", " three", "", "", ""], True)
    assert write(tokenizer, ids, stop=["thr"]) == (["one", " two", " ", "", "", ""], True)
    assert write(tokenizer, ids, stop=["zzz"])[0] == ["one", " two", " three", "\n\n", "four", ""]


def test_across_tokens_what_may_begin_one_is_held_back():
    tokenizer = Strings(["a<", "|", "end|>", "x", "b"])
    held = write(tokenizer, [0, 1, 3, 4], stop=["<|end|>"])
    assert held == (["a", "", "<|x", "b", ""], False)  # it was not one after all
    assert write(tokenizer, [0, 1, 2, 4], stop=["<|end|>"]) == (["a", "", "", "", ""], True)
    assert write(tokenizer, [0, 1], stop=["<|end|>"]) == (["a", "", "<|"], False)  # never decided


def test_a_failed_start_may_contain_another():
    """ "aab" in "aaab": a matcher that starts anew after each mismatch would miss it."""
    tokenizer = Strings(["a", "b"])
    assert write(tokenizer, [0, 0, 0, 1], stop=["aab"]) == (["", "", "a", "", ""], True)


def test_the_stop_string_that_is_complete_first_counts():
    for strings in (["abc"], ["a", "b", "c"], ["ab", "c"], ["a", "bc"]):
        ids = list(range(len(strings)))
        texts, ended = write(Strings(strings), ids, stop=["abc", "b"])
        assert ("".join(texts), ended) == ("a", True)
        texts, ended = write(Strings(strings), ids, stop=["c", "bc"])  # both end there: the longer
        assert ("".join(texts), ended) == ("a", True)


@given(
    st.text("ab\n", max_size=12),
    st.lists(st.integers(1, 4)),
    st.lists(st.text("ab\n", min_size=1, max_size=4)),
)
def test_equals_the_definition_however_it_is_split(text, sizes, stops):
    bounds = [0, *itertools.takewhile(lambda n: n < len(text), itertools.accumulate(sizes))]
    parts = [text[i:j] for i, j in zip(bounds, [*bounds[1:], len(text)])]
    texts, ended = write(Strings(parts), range(len(parts)), stop=stops)
    assert ("".join(texts), ended) == cut(text, stops)
    shown = ""
    for written, new in zip(itertools.accumulate(parts), texts):
        shown += new
        if not ended:  # only what a stop string may begin with is held back
            tail = written[len(shown) :]
            assert not tail or any(s.startswith(tail) for s in stops)


@pytest.mark.parametrize("stop", ["語", "😀", "本語", "é!"])
def test_characters_of_several_bytes(tokenizer, stop):
    text = "日本語 né! 😀 ok"
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text)
    texts, ended = write(tokenizer, ids, stop=[stop])
    assert ended and "".join(texts) == text[: text.index(stop)]
    assert "\ufffd" not in "".join(texts)


def test_an_unfinished_character_counts_at_the_end(tokenizer):
    half = tokenizer.encode("ok 🦀").ids[:-1]
    assert write(tokenizer, half)[0][-1] == "\ufffd"
    assert write(tokenizer, half, stop=["k \ufffd"])[0] == ["o", "", "", "", "", "", ""]
    assert (
        write(tokenizer, half, stop=["k z"])[0]
        == ["o", "", "", "", "", "", "k \ufffd"][: len(half) + 1]
    )


def test_the_end_token_gives_out_what_was_held():
    tokenizer = Strings(["a<", "b", ""])
    texts, ended = write(tokenizer, [0, 2, 1], ends=[2], stop=["<x"])
    assert texts == ["a", "<", "", ""] and ended  # and nothing after it


def test_the_context_is_neither_shown_nor_searched():
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert write(tokenizer, [2, 3], context=[1], stop=["e c"])[0] == [" cat", "s", ""]
    assert write(tokenizer, [2, 3])[0] == ["cat", "s", ""]  # at its beginning, no space
