"""Train the language model that ships with the module, on the source of Python's standard library.

    python scripts/train_language_model.py                 # train or resume, evaluate, export
    python scripts/train_language_model.py --steps 200 --work runs/trial   # a quick trial

Data: the .py files of the running interpreter's standard library, without tests, generated tables
and installed packages. About one module in twenty, chosen by a hash of its path, is held out. From
step to step, each row of a batch reads on in its text and carries its state along, so the model can
learn a memory longer than one window. Every --save-every steps the whole training state is saved in
--work, and the next run continues from there. A finished run is exported again.
To train on your own text: python -m mamba.train language-model.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import platform
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mamba import Mamba, MambaConfig, generate
from mamba.train.corpus import END, bits_per_byte, encode, text_batches, train_tokenizer
from mamba.train.loop import train
from mamba.train.optimizer import make_optimizer, weight_decay_mask
from mamba.train.results import describe_run

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}


# --- data ---------------------------------------------------------------------------------------


def read_library():
    """-> {relative path: source} for training, and the same for evaluation, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = {}, {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        is_held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20 == 0
        if text:
            (held_out if is_held_out else train)[name.as_posix()] = text
    return train, held_out


# --- evaluation ---------------------------------------------------------------------------------


def compressed_bits_per_byte(compress, texts):
    """Bits per byte of a compressor that gets one file at a time, as `gzip -9 FILE` does."""
    data = [t.encode() for t in texts]
    return 8 * sum(len(compress(d)) for d in data) / sum(map(len, data))


# --- export -------------------------------------------------------------------------------------


def to_half(params):
    """float16 for the matrices; A_log, D, biases and norms stay float32, as they do when loaded.

    The matrices are exactly the parameters that decay.
    """

    def convert(value, is_matrix):
        return value.astype(jnp.float16 if is_matrix else jnp.float32)

    return jax.tree.map(convert, params, weight_decay_mask(params))


def export(args, model, trained, tokenizer, held_out, corpus):
    """Write the checkpoint folder, load it back, evaluate the loaded model, and write the card.

    Args:
        args: the command's arguments.
        model: the trained model.
        trained: a ``Trained``.
        tokenizer: of the model.
        held_out: {path: source} to evaluate on.
        corpus: dict that describes the text, for the results and the card.
    """
    params = to_half(trained.params)
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
    run = describe_run() | {"devices": jax.device_count()}
    result = {
        "run": run,
        "settings": numbers(args),
        "corpus": corpus,
        "size": sizes,
        "seconds": round(trained.seconds),
        "bits_per_byte": {k: round(v, 4) for k, v in scores.items()},
        "greedy": greedy,
        "curve": [  # [step, mean loss of the last 20 steps in nats per token]
            [i + 20, round(float(trained.curve[i : i + 20, 0].mean()), 4)]
            for i in range(0, args.steps - 19, 20)
        ],
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(result))
    print(json.dumps(result["bits_per_byte"]), f"\n{greedy}")


def model_card(result):
    """The README that lies beside the weights, with the numbers of this run -> its text."""
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
    return p.parse_args()


def numbers(args):
    """The arguments that change the result -> dict."""
    return {k: v for k, v in vars(args).items() if k != "save_every" and not isinstance(v, Path)}


def main():
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    train_text, held_out = read_library()
    path = args.work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(train_text.values(), args.vocab_size).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    token_ids = encode(tokenizer, train_text.values())
    model = Mamba(MambaConfig(args.d_model, args.n_layer, tokenizer.get_vocab_size()))
    everything = "".join(f"{k}\n{v}" for k, v in sorted((train_text | held_out).items()))
    corpus = {
        "python": platform.python_version(),
        "modules": len(token_ids),
        "bytes": sum(len(t.encode()) for t in train_text.values()),
        "tokens": sum(map(len, token_ids)),
        "held_out_modules": len(held_out),
        "held_out_bytes": sum(len(t.encode()) for t in held_out.values()),
        "sha256": hashlib.sha256(everything.encode()).hexdigest(),
    }
    print(json.dumps(corpus))
    trained = train(
        model,
        text_batches(token_ids, args.batch, args.window, seed=args.seed),
        make_optimizer(args.learning_rate, args.steps, warmup=args.warmup),
        args.steps,
        seed=args.seed,
        carry=True,
        folder=args.work,
        save_every=args.save_every,
        resume=True,
        settings=corpus | numbers(args),
    )
    export(args, model, trained, tokenizer, held_out, corpus)


if __name__ == "__main__":
    main()
