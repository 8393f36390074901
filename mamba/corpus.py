"""Text for a language model: files -> tokens -> the batches that a training loop asks for."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mamba.loop import evaluate
from mamba.tasks import Batch

__all__ = ["END", "bits_per_byte", "encode", "read_texts", "text_batches", "train_tokenizer"]

END = "<|endoftext|>"  # between texts, and before the first token of each


def read_texts(paths):
    """Files, and all the files in folders, that hold UTF-8 text -> {path: text}, sorted by path.

    Files of other kinds and hidden ones are left out where they are found in a folder. Raises
    FileNotFoundError for a path that is not there, ValueError for a named file that is no text, or
    if there is no text at all.
    """
    texts = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        for file in inside:
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                if file == path:
                    raise ValueError(f"{file} is not UTF-8 text ({error})") from error
                continue
            if text:
                texts[file.as_posix()] = text
    if not texts:
        raise ValueError(f"no UTF-8 text in {', '.join(map(str, paths))}")
    return dict(sorted(texts.items()))


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE: every text has an encoding, and decoding gives back the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts):
    """-> a list with the token ids of each text, (l,) int32, the end of the one before it first."""
    end = tokenizer.token_to_id(END)
    return [np.array([end, *e.ids], np.int32) for e in tokenizer.encode_batch(list(texts))]


def text_batches(files, rows, window, *, seed=0):
    """A text in reading order: step number -> Batch of (rows, window) tokens and the next ones.

    An epoch is the files in random order, end to end, cut into equal rows; each step reads the next
    window of every row, so that the state can be carried along. A function of seed and step alone.
    Raises ValueError if the files are too short for one window a row.
    """
    length = sum(map(len, files)) // rows
    per_epoch = (length - 1) // window
    if per_epoch < 1:
        raise ValueError(
            f"{sum(map(len, files))} tokens are too few for {rows} rows of {window} tokens: "
            "add text, or ask for fewer rows (--batch) or a shorter window (--length)"
        )
    current = [None, None]  # the epoch that was asked for last, and its rows

    def batch(step):
        epoch, at = divmod(int(step), per_epoch)
        if current[0] != epoch:
            order = np.random.default_rng((seed, epoch)).permutation(len(files))
            text = np.concatenate([files[i] for i in order])
            current[:] = epoch, text[: length * rows].reshape(rows, length)
        tokens = current[1][:, at * window : (at + 1) * window + 1]  # (rows, window + 1)
        return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, window), bool))

    return batch


def bits_per_byte(model, params, tokenizer, texts, *, rows=8, window=512):
    """−log2 p(text) / bytes over all texts, each read whole from the zero state.

    Texts of similar length share a batch; windows carry the state, and padding has no weight.
    """
    texts = list(texts)
    files = sorted(encode(tokenizer, texts), key=len)
    batches = []
    for group in (files[i : i + rows] for i in range(0, len(files), rows)):
        length = -(-(max(map(len, group)) - 1) // window) * window
        tokens, real = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), bool)
        for row, file in enumerate(group):
            tokens[row, : len(file)] = file
            real[row, : len(file) - 1] = True
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], real))
    nats, _ = evaluate(model, params, batches, chunk=window)  # per token
    total = nats * sum(int(batch.mask.sum()) for batch in batches)
    return total / np.log(2) / sum(len(t.encode()) for t in texts)
