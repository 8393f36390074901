"""Text for a language model: files -> tokens -> the batches that a training loop asks for."""

import collections
import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mamba.train.metrics import evaluate
from mamba.train.tasks import Batch

__all__ = ["END", "bits_per_byte", "encode", "read_texts", "text_batches", "train_tokenizer"]

END = "<|endoftext|>"  # between texts, and before the first token of each


def read_texts(paths):
    """Read UTF-8 files, and all those in folders -> {path: text}, sorted by path.

    In a folder, hidden files and files that are not UTF-8 are skipped. So are links, which may lead
    out of it, what is no regular file, and what cannot be read; a warning says how many.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: what ``paths`` names is neither a folder nor a file of UTF-8 text, or there is
            no text at all.
    """
    texts = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_file():
            try:
                texts[path.as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error})") from error
        elif path.is_dir():
            texts |= _read_folder(path)
        else:
            raise ValueError(f"{path} is neither a file nor a folder")
    texts = {path: text for path, text in texts.items() if text}
    if not texts:
        raise ValueError(f"no UTF-8 text in {', '.join(map(str, paths))}")
    return dict(sorted(texts.items()))


def _read_folder(folder):
    """The texts of the regular files in a folder, and in folders in it -> {path: text}."""
    texts, left_out = {}, collections.Counter()
    unreadable = lambda error: left_out.update(["unreadable"])  # noqa: E731
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *names]:
            file = Path(parent, name)
            if name.startswith("."):
                continue
            elif file.is_symlink():
                left_out["links"] += 1
            elif name in folders:
                continue
            elif not file.is_file():
                left_out["not regular"] += 1
            else:
                try:
                    texts[file.as_posix()] = file.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                except OSError:
                    left_out["unreadable"] += 1
    if left_out:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(left_out.items()))
        warnings.warn(f"{folder}: left out {counts}", stacklevel=3)
    return texts


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE: it encodes every text, and decoding gives the same bytes back."""
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
    """The token ids of each text, END first -> a list of (l,) int32."""
    end = tokenizer.token_to_id(END)
    return [np.array([end, *e.ids], np.int32) for e in tokenizer.encode_batch(list(texts))]


def text_batches(token_ids, rows, window, *, seed=0):
    """Texts in reading order, for a training that carries the state from batch to batch.

    In each epoch, the texts are put end to end in random order and cut into equal rows. Each step
    reads the next window of every row. A batch depends on the seed and the step alone.

    Args:
        token_ids: (l,) int32 for each text, as ``encode`` returns them.
        rows: number of rows in a batch.
        window: number of tokens that a row reads in a step.
        seed: of the random orders.

    Returns:
        A function, step number -> ``tasks.Batch`` of (rows, window). The targets are the next
        tokens.

    Raises:
        ValueError: the texts are too short for one window in each row.
    """
    total = sum(map(len, token_ids))
    length = total // rows  # of a row
    steps_per_epoch = (length - 1) // window
    if steps_per_epoch < 1:
        raise ValueError(
            f"{total} tokens are too few for {rows} rows of {window} tokens: "
            "add text, or ask for fewer rows (--batch) or a shorter window (--length)"
        )

    @lru_cache(maxsize=1)
    def rows_of(epoch):
        order = np.random.default_rng((seed, epoch)).permutation(len(token_ids))
        joined = np.concatenate([token_ids[i] for i in order])  # (total,)
        return joined[: length * rows].reshape(rows, length)

    def batch(step):
        epoch, index = divmod(int(step), steps_per_epoch)
        start = index * window
        tokens = rows_of(epoch)[:, start : start + window + 1]  # (rows, window + 1)
        return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, window), bool))

    return batch


def bits_per_byte(model, params, tokenizer, texts, *, rows=8, window=512):
    """−log2 p(texts) / bytes. Each text is read whole, from the zero state.

    Texts of similar length share a batch. Padding is not scored.

    Args:
        model: a ``Mamba``.
        params: its parameters.
        tokenizer: the tokenizer of the model, with the token END.
        texts: the texts.
        rows: number of texts read at once.
        window: number of tokens read at once; the state is carried from window to window.

    Returns:
        The bits per byte, a float.
    """
    texts = list(texts)
    token_ids = sorted(encode(tokenizer, texts), key=len)
    batches = []
    for first in range(0, len(token_ids), rows):
        group = token_ids[first : first + rows]
        length = -(-(max(map(len, group)) - 1) // window) * window  # a whole number of windows
        tokens, scored = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), bool)
        for row, ids in enumerate(group):
            tokens[row, : len(ids)] = ids
            scored[row, : len(ids) - 1] = True
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], scored))
    nats, _ = evaluate(model, params, batches, chunk=window)  # per token
    total = nats * sum(int(batch.mask.sum()) for batch in batches)
    return total / np.log(2) / sum(len(t.encode()) for t in texts)
