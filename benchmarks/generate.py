"""Prefill and decoding of the 130m shape, and what a token costs as the text gets longer.

    python benchmarks/generate.py            # measures everything, about eight minutes
    python benchmarks/generate.py --quick    # a small shape, to see that it runs; writes nothing

Random weights of the 130m shape: speed does not depend on their values. Three ways side by side:
ours, PyTorch's through transformers (where both are installed), and the founding repository's:
an associative scan over all states at once, run over the whole padded sequence again for every
token. Every way runs in a process of its own, which also measures, in between, how fast this
machine reads memory: a token of decoding cannot take less time than reading the weights once. The
other two in float32 only, ours with bfloat16 weights too.

Then, with the model that ships with the module, the time and memory of one more token after l
tokens: (a) the sequence is run again, (b) padded to a fixed length, (c) one step from the state;
and the greedy texts and logits of float32 and bfloat16 weights side by side.

Writes benchmarks/results/generate.json.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from _report import head, load_average

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "generate.json"

SHAPE = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}  # 130m
QUICK = {"d_model": 64, "n_layer": 2, "vocab_size": 1000}
PREFILL = [128, 512]
BATCHES = [1, 2, 4, 8]
PROMPT = 8  # tokens before decoding
FOUNDING_LENGTH = 40  # its padded length
CONTEXTS = [64, 128, 256, 512, 1024, 2048]
ROUNDS = 2  # of all processes, one after the other: the machine is not equally fast all the time
TEXTS = ["def main(", "import ", "class Node:\n    def __init__(self", "for i in range("]


def best(function, repeats):
    """The least of several times of function(), in seconds, after one call that compiles."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def per_token(run, tokens, repeats, memory):
    """Seconds per decoded token: run(1 + tokens) against run(1), which also reads the prompt."""
    run(1), run(1 + tokens)  # compiles
    short, long = [], []
    for _ in range(repeats):
        memory.probe()
        for n, times in ((1, short), (1 + tokens, long)):
            start = time.perf_counter()
            run(n)
            times.append(time.perf_counter() - start)
    return (min(long) - min(short)) / tokens


class Memory:
    """How fast this machine reads memory: a matrix of that many bytes times a vector.

    Of all reads tried the fastest (a sum of the numbers is slower). The machine is not equally fast
    all the time, so it is probed between the measurements; the best counts, as it does for them.
    """

    def __init__(self, n_bytes):
        import jax
        import jax.numpy as jnp

        self.matrix = jnp.ones((n_bytes // 16384, 4096), jnp.float32)
        self.vector = jnp.ones(4096, jnp.float32)
        self.product = jax.jit(jnp.dot)
        self.bytes_per_s = 0.0
        self.probe()

    def probe(self):
        seconds = best(lambda: self.product(self.matrix, self.vector).block_until_ready(), 3)
        self.bytes_per_s = max(self.bytes_per_s, self.matrix.nbytes / seconds)


# --- three ways --------------------------------------------------------------------------------


class Ids:
    """In place of a tokenizer: a text of k characters is k tokens."""

    def __init__(self, vocab_size):
        self.vocabulary = {str(i): i for i in range(vocab_size)}

    def encode(self, text):
        return [7 + ord(c) % 64 for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "x" * len(ids)

    def get_vocab(self):
        return self.vocabulary


def random_model(shape, dtype):
    """Our model of that shape with random weights, drawn with NumPy: that is quick."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mamba import Mamba, MambaConfig

    model = Mamba(MambaConfig(**shape, dtype=jnp.dtype(dtype)))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        module, name = path[-2].key, path[-1].key
        kept = name in ("A_log", "D", "scale") or (module, name) == ("dt_proj", "bias")
        values = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        if name == "A_log":
            values = values + np.log(np.arange(1.0, leaf.shape[1] + 1))
        return jnp.asarray(values, jnp.float32 if kept else dtype)

    return model, jax.tree_util.tree_map_with_path(draw, tree)


def ours(shape, dtype, memory):
    import jax

    from mamba import generate, read_prompt, stream

    model, params = random_model(shape, dtype)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    text = {"params": params, "tokenizer": Ids(shape["vocab_size"])}
    rows, tokens = [], 24
    for l in PREFILL:
        read = functools.partial(read_prompt, model, **text, prompt="a" * l)
        seconds = best(lambda read=read: jax.block_until_ready(read()), 3)
        rows.append({"what": "prefill", "l": l, "b": 1, "seconds": seconds})
    for b in BATCHES:
        for sampling in ({"temperature": 0}, {"temperature": 1.0, "top_k": 40}):

            def run(n, b=b, sampling=sampling):
                prompt = ["a" * PROMPT] * b
                key = jax.random.key(0)
                generate(model, key=key, prompt=prompt, n_tokens_to_gen=n, **text, **sampling)

            seconds = per_token(run, tokens, 4, memory)
            how = "greedy" if sampling["temperature"] == 0 else "top-k 40"
            rows.append({"what": "decode", "how": how, "b": b, "seconds": seconds})

    def run(n):
        settings = {"prompt": "a" * PROMPT, "n_tokens_to_gen": n, "temperature": 0}
        assert len(list(stream(model, key=jax.random.key(0), **settings, **text))) == n

    seconds = per_token(run, tokens, 4, memory)
    rows.append({"what": "decode", "how": "stream", "b": 1, "seconds": seconds})
    return size, rows


def transformers(shape, dtype, memory):
    """PyTorch's Mamba with its cache; greedy."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = MambaConfig(
        hidden_size=shape["d_model"],
        num_hidden_layers=shape["n_layer"],
        vocab_size=-(-shape["vocab_size"] // 8) * 8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = MambaForCausalLM(config).eval().to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows, tokens = [], 12

    def run(n, b=1, l=PROMPT):
        ids = torch.full((b, l), 71)
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )

    for l in PREFILL:
        seconds = best(functools.partial(run, 1, l=l), 2)
        rows.append({"what": "prefill", "l": l, "b": 1, "seconds": seconds})
    for b in (1, 8):
        seconds = per_token(functools.partial(run, b=b), tokens, 3, memory)
        rows.append({"what": "decode", "how": "greedy", "b": b, "seconds": seconds})
    return size, rows


def founding_scan(x, delta, A, B, C, D, *, z, h0, resets, return_state):
    """The selective scan with every state in memory at once, (b, l, d, n)."""
    import jax
    import jax.numpy as jnp

    from mamba.scan import combine

    f32 = jnp.float32
    decay = jnp.exp(delta[..., None] * A)  # (b, l, d, n)
    inputs = (delta * x.astype(f32))[..., None] * B[:, :, None].astype(f32)  # (b, l, d, n)
    _, h = jax.lax.associative_scan(combine, (decay, inputs), axis=1)  # (b, l, d, n)
    y = jnp.einsum("bldn,bln->bld", h, C.astype(f32)) + D * x
    y = (y * jax.nn.silu(z.astype(f32))).astype(x.dtype)  # (b, l, d)
    return (y, h[:, -1]) if return_state else y


def founding(shape, dtype, memory):
    import jax
    import jax.numpy as jnp

    import mamba.mamba1

    mamba.mamba1.selective_scan = founding_scan
    model, params = random_model(shape, dtype)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    rows = []
    for l in PREFILL:
        tokens = jnp.full((1, l), 71)
        seconds = best(lambda tokens=tokens: apply(params, tokens).block_until_ready(), 2)
        rows.append({"what": "prefill", "l": l, "b": 1, "seconds": seconds})
    for b in (1, 8):
        tokens = jnp.full((b, FOUNDING_LENGTH), 71)

        def token(tokens=tokens):
            logits = apply(params, tokens)[:, PROMPT]
            return tokens.at[:, PROMPT + 1].set(jnp.argmax(logits, -1)).block_until_ready()

        rows.append({"what": "decode", "how": "greedy", "b": b, "seconds": best(token, 4)})
    return size, rows


WAYS = {"ours": ours, "transformers": transformers, "founding": founding}


def measure(way, dtype, quick):
    """All rows of one way and dtype, in this process."""
    shape = QUICK if quick else SHAPE
    memory = Memory(2**24 if quick else 516 * 10**6)
    size, rows = WAYS[way](shape, dtype, memory)
    bandwidth = memory.bytes_per_s
    for row in rows:
        tokens = row["b"] * row.get("l", 1)
        row["tokens_per_s"] = tokens / row["seconds"]
        if row["what"] == "decode":
            row["of_bandwidth_limit"] = size / bandwidth / row["seconds"]
    head = {"way": way, "dtype": dtype, "weights_bytes": size, "read_bytes_per_s": bandwidth}
    return [head | row for row in rows]


def quickest(rows):
    """Of several measurements of one thing the quickest: what disturbs them only adds time."""
    best = {}
    for row in rows:
        key = tuple(row.get(k) for k in ("way", "dtype", "what", "how", "l", "b"))
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    return list(best.values())


# --- one more token after l tokens ---------------------------------------------------------------


def contexts(quick):
    """Time and memory of the next token of the embedded model, in three ways."""
    import jax
    import jax.numpy as jnp

    from mamba import EMBEDDED, Mamba, state_bytes

    model, params = Mamba.from_pretrained(EMBEDDED)
    lengths, rows = CONTEXTS[: 2 if quick else None], []

    def read(params, tokens, ends):
        state = model.initial_state(1)
        return model.apply({"params": params}, tokens, state, ends, method="last_logits")[0]

    def step(params, token, state):
        return model.apply({"params": params}, token, state, method="last_logits")

    def point(way, l, function, *args):
        start = time.perf_counter()
        program = jax.jit(function).lower(*args).compile()
        compiling = time.perf_counter() - start
        seconds = best(lambda: jax.block_until_ready(program(*args)), 5)
        plan = program.memory_analysis()
        row = {"way": way, "l": l, "seconds": seconds, "compile_s": compiling}
        row["program_bytes"] = plan.temp_size_in_bytes + plan.output_size_in_bytes
        rows.append(row)

    for l in lengths:
        ends = jnp.array([l])
        point("whole sequence", l, read, params, jnp.full((1, l), 71), ends)
        point("fixed length", l, read, params, jnp.full((1, lengths[-1]), 71), ends)
        point("state", l, step, params, jnp.full((1, 1), 71), model.initial_state(1))
    return {"state_bytes": state_bytes(model.config), "rows": rows}


def dtypes(quick):
    """What bfloat16 weights change: the logits, and greedy texts, of the embedded model."""
    import jax
    import jax.numpy as jnp

    from mamba import EMBEDDED, Mamba, generate
    from mamba.checkpoint.hub import load_tokenizer

    tokenizer = load_tokenizer(EMBEDDED)
    texts, logits, tokens = {}, {}, None
    for dtype in ("float32", "bfloat16"):
        model, params = Mamba.from_pretrained(EMBEDDED, dtype=dtype)
        settings = {"params": params, "tokenizer": tokenizer, "key": jax.random.key(0)}
        settings |= {"prompt": TEXTS, "n_tokens_to_gen": 24, "temperature": 0}
        texts[dtype] = generate(model, **settings)
        if tokens is None:  # both read what float32 wrote
            tokens = jnp.array([tokenizer.encode(texts[dtype][2]).ids])
        logits[dtype] = model.apply({"params": params}, tokens)
    a, b = logits.values()
    difference = float(jnp.abs(a - b).max() / jnp.abs(a).max())
    return {"largest_logit_difference": difference, "greedy": texts}


# --- all of it -----------------------------------------------------------------------------------


def in_child(function, *args):
    """function(*args) in a fresh process: nothing of one way is left over for the next."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--part",
        json.dumps([function, args]),
    ]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function}{args}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rounded(value):
    """Four digits: more are noise."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def installed(way):
    import importlib.util

    return way != "transformers" or all(map(importlib.util.find_spec, ("torch", "transformers")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, writes nothing")
    parser.add_argument("--note", default="", help="what else ran on the machine meanwhile")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        function, arguments = json.loads(args.part)
        print(json.dumps(rounded(globals()[function](*arguments))))
        return
    load, rows = load_average(), []
    runs = [("float32", way) for way in filter(installed, WAYS)]
    for dtype, way in runs if args.quick else [*runs, ("bfloat16", "ours")] * ROUNDS:
        rows += in_child("measure", way, dtype, args.quick)
    for row in (rows := quickest(rows)):
        limit = row.get("of_bandwidth_limit")
        print(
            f"{row['way']:13s}{row['dtype']:9s}{row['what']:8s}{row.get('l', row.get('how')):>9} "
            f"b={row['b']} {row['tokens_per_s']:9.1f} tokens/s"
            + (f"  {limit:.0%} of the bandwidth limit" if limit else ""),
            flush=True,
        )
    report = {
        "next_token": in_child("contexts", args.quick),
        "dtypes": in_child("dtypes", args.quick),
    }
    for row in report["next_token"]["rows"]:
        print(
            f"{row['way']:15s}l={row['l']:5d} {1e3 * row['seconds']:8.2f} ms "
            f"{row['program_bytes'] / 2**20:8.2f} MiB"
        )
    print(report["dtypes"])
    if args.quick:
        return
    report = head(args.note, load) | {"shape": SHAPE, "speed": rows} | report
    RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
