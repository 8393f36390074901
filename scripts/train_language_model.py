"""Train the language model that ships with the module, on the source of Python's standard library.

    python scripts/train_language_model.py                 # train or resume, evaluate, export
    python scripts/train_language_model.py --steps 200     # a quick trial
    python scripts/train_language_model.py --export-only   # evaluate and export the last save

Data: the .py files of the running interpreter's standard library, without tests, generated tables
and installed packages. Modules whose name hashes into one bucket of twenty are held out, whole.
The rows of a batch read on through the text from step to step and carry their state along, so the
model can learn a memory longer than one window. Every --save-every steps all of the training state
is written aside and renamed into --work, and the next run continues from there.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from mamba import Mamba, MambaConfig, generate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from mamba.machine import describe_run  # noqa: E402

END = "<|endoftext|>"  # between modules, and before the first token of each
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}


# --- data ---------------------------------------------------------------------------------------


def read_library():
    """{relative path: source} for training and for evaluation, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = {}, {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        bucket = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20
        if text:
            (held_out if bucket == 0 else train)[name.as_posix()] = text
    return train, held_out


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


def read_rows(files, rows, rng):
    """One epoch: the modules in random order, end to end, cut into equal rows: (rows, tokens)."""
    order = rng.permutation(len(files))
    text = np.concatenate([files[i] for i in order])
    return text[: len(text) // rows * rows].reshape(rows, -1)


# --- training -----------------------------------------------------------------------------------


def make_optimizer(args, params):
    """AdamW, warm-up, cosine; no decay on A_log, D, biases and norms, as in the released code."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.warmup, args.steps, args.learning_rate / 20
    )
    decay = jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decay),
    )


def cross_entropy(logits, targets):
    """Mean negative log-likelihood in nats; logits (..., v), targets (...)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_step(model, optimizer):
    def loss_fn(params, tokens, state):
        logits, state = model.apply({"params": params}, tokens[:, :-1], state)
        return cross_entropy(logits, tokens[:, 1:]), state

    @jax.jit
    def step(params, opt_state, state, tokens):
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens, state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, loss

    return step


def save(path, train_state):
    """Write aside, then rename: whenever the run is killed, the last whole save stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_bytes(serialization.to_bytes(train_state))
    os.replace(aside, path)


def train(args, model, files, work):
    """Run to args.steps from wherever the last save stands. -> params, all of the training state"""
    params = jax.jit(model.init)(jax.random.PRNGKey(args.seed), jnp.zeros((1, 8), jnp.int32))
    params = params["params"]
    optimizer = make_optimizer(args, params)
    train_state = {
        "params": params,
        "opt_state": optimizer.init(params),
        "state": model.initial_state(args.batch),
        "step": 0,
        "seconds": 0.0,
        "curve": np.zeros((args.steps, 2), np.float32),
    }
    path = work / "train_state.msgpack"
    if path.exists():
        train_state = serialization.from_bytes(train_state, path.read_bytes())
    params, opt_state, state = (train_state[k] for k in ("params", "opt_state", "state"))
    if args.export_only:
        return params, train_state

    step_fn = make_step(model, optimizer)
    # With two devices every one takes half of the rows: the scan keeps only one core busy.
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("rows",))
    by_row = jax.NamedSharding(mesh, jax.P("rows"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    params, opt_state = jax.device_put((params, opt_state), everywhere)
    state = jax.device_put(state, by_row)

    epoch, start, rows = -1, 0, None
    first, began = int(train_state["step"]), time.time() - float(train_state["seconds"])
    bar = tqdm(initial=first, total=args.steps, unit="step")
    curve = np.array(train_state["curve"])
    for i in range(args.steps):
        if rows is None or start + args.window + 1 > rows.shape[1]:
            epoch, start = epoch + 1, 0
            rows = read_rows(files, args.batch, np.random.default_rng((args.seed, epoch)))
        window, start = rows[:, start : start + args.window + 1], start + args.window
        if i < first:  # a resumed run walks through the data it has seen
            continue
        tokens = jax.device_put(window.astype(np.int32), by_row)
        params, opt_state, state, loss = step_fn(params, opt_state, state, tokens)
        curve[i] = float(loss), time.time() - began
        if not np.isfinite(curve[i, 0]):
            raise FloatingPointError(f"the loss is {curve[i, 0]} at step {i}; last save: {path}")
        bar.update()
        bar.set_postfix(loss=f"{curve[max(0, i - 49) : i + 1, 0].mean():.3f}", epoch=epoch)
        if (i + 1) % args.save_every == 0 or i + 1 == args.steps:
            train_state = {
                "params": params,
                "opt_state": opt_state,
                "state": state,
                "step": i + 1,
                "seconds": time.time() - began,
                "curve": curve,
            }
            save(path, jax.device_get(train_state))
    return params, train_state


# --- evaluation ---------------------------------------------------------------------------------


def bits_per_byte(model, params, tokenizer, texts, rows=8, window=512):
    """−log2 p(text) / bytes over all texts, each read whole from the zero state.

    Texts of similar length share a batch; windows carry the state, and padding has no weight.
    """

    @jax.jit
    def nats(state, tokens, targets, real):
        logits, state = model.apply({"params": params}, tokens, state)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(loss * real), state

    end = tokenizer.token_to_id(END)
    files = sorted((np.array([end, *e.ids]) for e in tokenizer.encode_batch(texts)), key=len)
    total = 0.0
    for group in (files[i : i + rows] for i in range(0, len(files), rows)):
        length = -(-(max(map(len, group)) - 1) // window) * window
        tokens, real = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), np.float32)
        for row, file in enumerate(group):
            tokens[row, : len(file)] = file
            real[row, : len(file) - 1] = 1
        state = model.initial_state(rows)
        for at in range(0, length, window):
            cut = slice(at, at + window)
            loss, state = nats(state, tokens[:, :-1][:, cut], tokens[:, 1:][:, cut], real[:, cut])
            total += float(loss)
    return total / np.log(2) / sum(len(t.encode()) for t in texts)


def compressed_bits_per_byte(compress, texts):
    """The same for a compressor that gets one file at a time, as `gzip -9 FILE` does."""
    data = [t.encode() for t in texts]
    return 8 * sum(len(compress(d)) for d in data) / sum(map(len, data))


# --- export -------------------------------------------------------------------------------------


def to_half(params):
    """float16 for the matrices; A_log, D, biases and norms stay float32, as they do when loaded."""
    return jax.tree.map_with_path(
        lambda path, v: v.astype(
            jnp.float16 if path[-1].key in ("kernel", "embedding") else jnp.float32
        ),
        params,
    )


def export(args, model, params, tokenizer, held_out, train_state, corpus):
    """Write the checkpoint folder, load it back, evaluate what was stored, and write the card."""
    params = to_half(jax.device_get(params))
    model.save_pretrained(params, args.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(args.out)

    model, params = Mamba.from_pretrained(args.out)
    texts = list(held_out.values())
    sizes = {
        "parameters": sum(v.size for v in jax.tree.leaves(params)),
        "folder_bytes": sum(f.stat().st_size for f in args.out.iterdir() if f.name != "README.md"),
    }
    scores = {
        "model": bits_per_byte(model, params, tokenizer, texts),
        "gzip -9": compressed_bits_per_byte(lambda d: gzip.compress(d, 9, mtime=0), texts),
        "xz -9": compressed_bits_per_byte(lambda d: lzma.compress(d, preset=9), texts),
    }
    prompt = "def __init__(self"
    greedy = generate(
        model,
        key=jax.random.PRNGKey(0),
        params=params,
        tokenizer=tokenizer,
        prompt=prompt,
        n_tokens_to_gen=60,
        temperature=0,
    )
    steps = int(train_state["step"])
    run = describe_run() | {"devices": jax.device_count()}
    run["command"] = run["command"].removesuffix(" --export-only")  # the one that trains
    result = {
        "run": run,
        "settings": {
            k: v for k, v in vars(args).items() if k != "export_only" and not isinstance(v, Path)
        },
        "corpus": corpus,
        "size": sizes,
        "seconds": round(float(train_state["seconds"])),
        "bits_per_byte": {k: round(v, 4) for k, v in scores.items()},
        "greedy": greedy,
        "curve": [  # mean loss in nats per token over stretches of 20 steps
            [int(i) + 20, round(float(train_state["curve"][i : i + 20, 0].mean()), 4)]
            for i in range(0, steps - 19, 20)
        ],
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(result))
    print(json.dumps(result["bits_per_byte"]), f"\n{greedy}")


def model_card(result):
    """The card beside the weights, from the numbers of this run."""
    r, c, s, bits = result, result["corpus"], result["settings"], result["bits_per_byte"]
    run = r["run"]
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    return f"""# pystdlib: a small Mamba that has read Python's standard library

The checkpoint that ships with the module, so that everything in the book runs without a network.
It is for learning and for tests: it writes text that looks like Python, not programs that work.

| | |
|---|---|
| architecture | Mamba, d_model {s["d_model"]}, {s["n_layer"]} layers, d_state 16, tied embeddings |
| parameters | {r["size"]["parameters"]:,} (matrices stored in float16, the rest in float32) |
| tokenizer | byte-level BPE, {s["vocab_size"]} entries, trained on the same text |
| data | Python {c["python"]}'s standard library without tests, `encodings`, `pydoc_data` |
| training text | {c["modules"]} modules, {c["bytes"]:,} bytes, {c["tokens"]:,} tokens |
| held out | {c["held_out_modules"]} modules, {c["held_out_bytes"]:,} bytes (by hash of the path) |
| SHA-256 of all the text | `{c["sha256"]}` |
| steps | {s["steps"]} × {s["batch"]} rows × {s["window"]} tokens, state carried along |
| optimizer | AdamW, {s["learning_rate"]} with warm-up {s["warmup"]} and cosine; seed {s["seed"]} |
| time | {r["seconds"] / 60:.0f} minutes on {run["processor"]}, {run["cores"]} cores, no GPU |
| command | `{run["command"]}`, on {run["devices"]} JAX device(s) |
| versions | {versions} |

## Bits per byte on the held-out modules

| | bits per byte |
|---|---|
| this model | **{bits["model"]:.3f}** |
| `xz -9`, file by file | {bits["xz -9"]:.3f} |
| `gzip -9`, file by file | {bits["gzip -9"]:.3f} |

All three read each file from its beginning and know nothing of the others held out. The comparison
gives the scale and is no contest: the model has read the training modules before, and the size of
its weights is not counted.

## Greedy continuation of `def __init__(self`

```python
{r["greedy"]}
```

## Licence

The weights were trained on the source of CPython's standard library, which is distributed under the
PSF License; the checkpoint comes under the MIT licence of this repository.
"""


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=int, default=2400)
    p.add_argument("--batch", type=int, default=8, help="rows that are read at the same time")
    p.add_argument("--window", type=int, default=256, help="tokens a row reads in one step")
    p.add_argument("--d-model", type=int, default=256)
    p.add_argument("--n-layer", type=int, default=6)
    p.add_argument("--vocab-size", type=int, default=4096)
    p.add_argument("--learning-rate", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=100)
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "language_model")
    p.add_argument("--out", type=Path, default=ROOT / "mamba" / "weights" / "pystdlib")
    p.add_argument(
        "--result", type=Path, default=ROOT / "benchmarks" / "results" / "language_model.json"
    )
    p.add_argument("--export-only", action="store_true", help="evaluate and export the last save")
    return p.parse_args()


def main():
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    train_text, held_out = read_library()
    path = args.work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(train_text.values(), args.vocab_size).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    end = tokenizer.token_to_id(END)
    files = [
        np.array([end, *encoding.ids], np.uint16)
        for encoding in tokenizer.encode_batch(list(train_text.values()))
    ]
    model = Mamba(MambaConfig(args.d_model, args.n_layer, tokenizer.get_vocab_size()))
    everything = "".join(f"{k}\n{v}" for k, v in sorted((train_text | held_out).items()))
    corpus = {
        "python": platform.python_version(),
        "modules": len(files),
        "bytes": sum(len(t.encode()) for t in train_text.values()),
        "tokens": sum(map(len, files)),
        "held_out_modules": len(held_out),
        "held_out_bytes": sum(len(t.encode()) for t in held_out.values()),
        "sha256": hashlib.sha256(everything.encode()).hexdigest(),
    }
    print(json.dumps(corpus))
    params, train_state = train(args, model, files, args.work)
    export(args, model, params, tokenizer, held_out, train_state, corpus)


if __name__ == "__main__":
    main()
