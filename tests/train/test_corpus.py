"""Text as data: files, tokens, batches, bits per byte."""

import os

import jax
import numpy as np
import pytest

from mamba import Mamba, MambaConfig
from mamba.train import corpus
from tests.helpers.parameters import random_params

WORDS = "".join(f"{i} and {i * i % 97} are numbers. " for i in range(300))


def test_read_texts(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.md").write_text("øne")
    (tmp_path / "a" / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "a" / "empty.md").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    assert list(corpus.read_texts([tmp_path]).values()) == ["øne", "two"]
    assert list(corpus.read_texts([tmp_path / "b.txt"]).values()) == ["two"]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        corpus.read_texts([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="image.png is not UTF-8 text"):
        corpus.read_texts([tmp_path / "a" / "image.png"])
    with pytest.raises(ValueError, match="no UTF-8 text in"):
        corpus.read_texts([tmp_path / "a" / "empty.md"])


def test_a_folder_gives_its_own_regular_files_only(tmp_path):
    """A link may lead out of the folder, and a named pipe waits for ever."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (outside / "in").mkdir(parents=True)
    (folder / "in").mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    (folder / "in" / "a.txt").write_text("a")
    (folder / "file").symlink_to(outside / "secret.txt")
    (folder / "to").symlink_to(outside)
    (folder / "in" / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    with pytest.warns(UserWarning, match="left out 3 links, 1 not regular"):
        assert list(corpus.read_texts([folder]).values()) == ["a"]
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        corpus.read_texts([folder / "pipe"])
    assert list(corpus.read_texts([folder / "file"]).values()) == ["secret"]  # named by the user


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_cannot_be_read_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "b.txt").chmod(0)
    with pytest.warns(UserWarning, match="left out 1 unreadable"):
        assert list(corpus.read_texts([tmp_path]).values()) == ["a"]


def test_tokenizer_gives_back_every_text():
    tokenizer = corpus.train_tokenizer([WORDS], 300)
    assert tokenizer.get_vocab_size() == 300
    for text in (WORDS, "ünknown ✓\n\t ", corpus.END):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    (ids,) = corpus.encode(tokenizer, ["and are"])
    assert ids[0] == tokenizer.token_to_id(corpus.END) and tokenizer.decode(ids) == "and are"


def test_bits_per_byte():
    """Texts of unequal lengths, with characters of two bytes, read in windows of 8 tokens."""
    tokenizer = corpus.train_tokenizer([WORDS], 300)
    model = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=300, d_state=4))
    params = random_params(model)
    texts = ["3 and 9 are numbers", "ünknown", "and are. " * 4]
    tokens = np.zeros((3, 40), np.int32)  # causal: what comes after a text does not matter
    token_ids = corpus.encode(tokenizer, texts)
    for row, ids in zip(tokens, token_ids, strict=True):
        row[: len(ids)] = ids
    logits = np.float64(jax.jit(model.apply)({"params": params}, tokens))
    nats = 0.0
    for row, ids in zip(logits, token_ids, strict=True):
        log_p = row - np.log(np.exp(row).sum(axis=-1, keepdims=True))
        nats -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
    expected = nats / np.log(2) / sum(len(text.encode()) for text in texts)
    actual = corpus.bits_per_byte(model, params, tokenizer, texts, rows=2, window=8)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_text_batches_read_on_and_shuffle_by_epoch():
    token_ids = [np.arange(start, start + 40) for start in (0, 100, 200)]
    batch = corpus.text_batches(token_ids, 2, 9, seed=3)
    row = np.concatenate([batch(step).tokens[0] for step in range(6)])  # 60 tokens: 6 windows
    assert len({*row.tolist()}) == 54 and (np.diff(row) == 1).sum() >= 52
    first, second = batch(0), batch(1)
    assert (first.targets[:, :-1] == first.tokens[:, 1:]).all() and first.mask.all()
    assert (first.targets[:, -1] == second.tokens[:, 0]).all()
    assert (batch(0).tokens == first.tokens).all() and (batch(6).tokens != first.tokens).any()
    assert (corpus.text_batches(token_ids, 2, 9, seed=4)(0).tokens != first.tokens).any()
    with pytest.raises(ValueError, match="120 tokens are too few for 4 rows of 30"):
        corpus.text_batches(token_ids, 4, 30)
