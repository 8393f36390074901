"""Time, memory and compile time of Mamba-2's recurrence, and of the whole 130m shape.

    python benchmarks/ssd.py            # measures everything, about a quarter of an hour
    python benchmarks/ssd.py --quick    # small sizes, to see that it runs; writes nothing

One layer of the 130m shape (24 heads of 64 channels, 128 states, one group), by four ways: ssd's
"chunked" and "quadratic"; "lax.scan", the recurrence as one would first write it, which JAX
differentiates; "checkpoint", the same with a ``jax.checkpoint`` around every 64 steps; and the
selective scan, "mamba-1" with as many states, and "mamba-1, 16 states". Then "chunked" with other
chunk lengths; then the whole model, prefill and decoding, beside transformers (where PyTorch and
transformers are installed), and how fast this machine reads the weights once. Where mamba2-jax is
installed, its `ssd_forward` stands beside ours, with its default chunks of 256.

Each point is measured in a fresh process. A point is left out, and the reason recorded, where it
would need more than 6 GB or more than half a minute. Writes benchmarks/results/ssd.json, and the
same to mamba_book/data for chapter 11.
"""

import functools
import importlib.util
import time

import numpy as np
from _measure import PREFILL, PROMPT, TOKENS, best, in_child, measure_model, run_by_part

LENGTHS = [64, 512, 2048, 8192, 65536]
CHUNKS = [16, 32, 64, 128, 256]
LENGTH = 2048
SIZES = {"h": 24, "p": 64, "n": 128}  # one layer of the 130m shape
SHAPE = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}
QUICK_SIZES, QUICK_SHAPE = {"h": 2, "p": 8, "n": 8}, {"d_model": 64, "n_layer": 2, "vocab_size": 99}
PASSES = ["forward", "forward+backward"]
GIGABYTES = 6.0
# Arrays of l·h·p·n numbers that a method holds at its peak, and the longest text in half a minute.
STATES = {("lax.scan", "forward+backward"): 3}
LIMITS = {("lax.scan", "forward+backward"): 8192, ("quadratic", "forward"): 8192}
LIMITS |= {("quadratic", "forward+backward"): 2048, ("mamba-1", "forward+backward"): 2048}
LIMITS |= {("mamba2-jax", "forward+backward"): 2048, ("checkpoint", "forward+backward"): 2048}


def random_inputs(l, h, p, n):
    """x, delta, A, B, C, D of one sequence, B and C of one group."""
    rng = np.random.default_rng(0)
    x, (B, C) = rng.normal(size=(1, l, h, p)), rng.normal(size=(2, 1, l, 1, n))
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (1, l, h)))
    inputs = x, delta, -rng.uniform(1, 16, h), B, C, rng.normal(size=h)
    return [v.astype(np.float32) for v in inputs]


def plain(x, delta, A, B, C, D):
    """The recurrence through `lax.scan`, as one would first write it; JAX differentiates it."""
    import jax
    import jax.numpy as jnp

    def step(h, inputs):
        x_t, delta_t, B_t, C_t = inputs  # (b, h, p), (b, h), (b, 1, n), (b, 1, n)
        write = (delta_t[..., None] * x_t)[..., None] * B_t[:, :, None]  # (b, h, p, n)
        h = jnp.exp(delta_t * A)[..., None, None] * h + write
        return h, jnp.einsum("bhpn,bn->bhp", h, C_t[:, 0])

    h0 = jnp.zeros((*x.shape[:1], *x.shape[2:], B.shape[-1]))
    _, y = jax.lax.scan(step, h0, tuple(v.swapaxes(0, 1) for v in (x, delta, B, C)))
    return y.swapaxes(0, 1) + D[:, None] * x


def checkpointed(x, delta, A, B, C, D):
    """``plain``, but of every 64 steps only the first state is stored."""
    import jax
    import jax.numpy as jnp

    def step(h, inputs):
        u_t, a_t, B_t, C_t = inputs  # (b, h, p), (b, h), (b, n), (b, n)
        h = a_t[..., None, None] * h + u_t[..., None] * B_t[:, None, None]  # (b, h, p, n)
        return h, jnp.einsum("bhpn,bn->bhp", h, C_t)

    @jax.checkpoint
    def steps(h, inputs):
        return jax.lax.scan(step, h, inputs)

    inputs = delta[..., None] * x, jnp.exp(delta * A), B[:, :, 0], C[:, :, 0]
    inputs = [v.swapaxes(0, 1).reshape(-1, 64, 1, *v.shape[2:]) for v in inputs]
    _, y = jax.lax.scan(steps, jnp.zeros((*x.shape[:1], *x.shape[2:], B.shape[-1])), inputs)
    return y.reshape(-1, 1, *x.shape[2:]).swapaxes(0, 1) + D[:, None] * x


def mamba1(x, delta, A, B, C, D, n=None):
    """The selective scan with as many channels and n states, each state with its own decay."""
    import jax.numpy as jnp

    from mamba import selective_scan

    b, l, h, p = x.shape
    B, C = B[..., :n], C[..., :n]
    channels = x.reshape(b, l, h * p)
    rates = jnp.repeat(A, p)[:, None] * jnp.linspace(0.9, 1.1, B.shape[-1])  # (d, n)
    steps = jnp.repeat(delta, p, axis=-1)
    return selective_scan(channels, steps, rates, B[:, :, 0], C[:, :, 0], jnp.repeat(D, p))


def find(method, chunk):
    """The function of a method."""
    if method == "lax.scan":
        return plain
    if method == "checkpoint":
        return checkpointed
    if method == "mamba-1":
        return mamba1
    if method == "mamba-1, 16 states":
        return functools.partial(mamba1, n=16)
    if method == "mamba2-jax":
        import jax.numpy as jnp
        from mamba2_jax import ssd_forward

        def theirs(x, delta, A, B, C, D):
            B, C = (jnp.repeat(v, x.shape[2], axis=2) for v in (B, C))  # it has no groups
            dt = jnp.log(jnp.expm1(delta))  # it applies the softplus itself
            none, T = jnp.zeros_like(A), chunk or 256  # 256: its default
            return ssd_forward(x, dt, A, B, C, T, D, none, 0.0, jnp.inf)[0]

        return theirs
    from mamba.ssd import ssd

    return functools.partial(ssd, method=method, **({"chunk": chunk} if chunk else {}))


def measure_layer(method, which, l, sizes, chunk=None):
    """One point, in this process -> dict of times and memory."""
    import jax

    run, inputs = find(method, chunk), random_inputs(l, **sizes)
    if which == "forward+backward":
        function = jax.value_and_grad(lambda *v: (run(*v) ** 2).sum(), argnums=range(6))
    else:
        function = run
    inputs = jax.block_until_ready(jax.device_put(inputs))
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    plan = compiled.memory_analysis()
    return best(lambda: jax.block_until_ready(compiled(*inputs))) | {
        "compile_s": round(compile_s, 3),
        "program_bytes": plan.temp_size_in_bytes + plan.output_size_in_bytes,
    }


# --- the whole model ----------------------------------------------------------------------------


def measure_ours(shape):
    """Prefill and greedy decoding by this module -> dict of seconds."""
    from mamba.mamba2 import Mamba2Config

    return measure_model(Mamba2Config(**shape))


def measure_theirs(shape):
    """The same by transformers -> dict of seconds."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    heads = 2 * shape["d_model"] // SIZES["p"]
    config = Mamba2Config(
        hidden_size=shape["d_model"],
        num_hidden_layers=shape["n_layer"],
        vocab_size=-(-shape["vocab_size"] // 16) * 16,
        num_heads=heads,
        n_groups=1,
        tie_word_embeddings=True,
        chunk_size=256,
    )
    model = Mamba2ForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(0, shape["vocab_size"], (1, PREFILL)))

    def write(n):
        every = torch.ones_like(tokens[:, :PROMPT])
        model.generate(
            tokens[:, :PROMPT],
            attention_mask=every,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )

    with torch.no_grad():
        prefill = best(lambda: model(tokens))["min_ms"] / 1e3
        times = [best(lambda n=n: write(n))["min_ms"] / 1e3 for n in (1, 1 + TOKENS)]
    return {
        "prefill_s": round(prefill, 4),
        "decode_s": round((times[1] - times[0]) / TOKENS, 5),
    }


# --- all of it ----------------------------------------------------------------------------------


def why_not(method, which, l, sizes):
    """The reason to leave a point out, or None."""
    numbers = STATES.get((method, which), 0) * l * sizes["h"] * sizes["p"] * sizes["n"]
    if method == "quadratic":
        numbers = 3 * l * l * sizes["h"]
    if 4 * numbers > GIGABYTES * 1e9:
        return "memory"
    return "time" if l > LIMITS.get((method, which), l) else None


def measure_all(lengths, chunks, sizes, shape):
    methods = ["chunked", "lax.scan", "quadratic", "mamba-1", "mamba-1, 16 states", "checkpoint"]
    if importlib.util.find_spec("mamba2_jax"):
        methods.append("mamba2-jax")
    for l in lengths:
        for which in PASSES:
            for method in methods:  # neighbours in time, so that their ratio is worth more
                row = {"of": "layer", "method": method, "pass": which, "l": l} | sizes
                reason = why_not(method, which, l, sizes)
                if method == "checkpoint" and which == "forward":
                    continue  # the same as "lax.scan"
                if reason:
                    yield row | {"skipped": reason}
                else:
                    yield row | in_child(__file__, "measure_layer", method, which, l, sizes)
    for chunk in chunks:
        for which in PASSES:
            row = {"of": "chunk", "chunk": chunk, "pass": which, "l": LENGTH} | sizes
            yield row | in_child(__file__, "measure_layer", "chunked", which, LENGTH, sizes, chunk)
    yield {"of": "model", "way": "ours"} | shape | in_child(__file__, "measure_ours", shape)
    if all(importlib.util.find_spec(p) for p in ("torch", "transformers")):
        yield (
            {"of": "model", "way": "transformers"}
            | shape
            | in_child(__file__, "measure_theirs", shape)
        )


if __name__ == "__main__":
    run_by_part(
        "ssd",
        measure_all,
        full=(LENGTHS, CHUNKS, SIZES, SHAPE),
        quick=([64], [16], QUICK_SIZES, QUICK_SHAPE),
    )
