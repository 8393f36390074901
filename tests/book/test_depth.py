"""Counting on a jaxpr: small programs whose depth, work and traffic one can see."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from mamba import selective_scan
from mamba.scan import combine
from mamba_book.depth import bytes_moved, dependency_depth, operations

ONE = jax.ShapeDtypeStruct((), jnp.float32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def twice(x):
    return x * x * x


@jax.custom_vjp
def own_rule(x):
    return twice(x)


own_rule.defvjp(lambda x: (own_rule(x), x), lambda x, g: (3 * x * x * g + 1,))


@pytest.mark.parametrize(
    ("program", "depth", "total"),
    [
        (lambda x: ((x * x) * x) * x, 3, 3),
        (lambda x: (x * x) * (x * x), 2, 3),
        (lambda x: twice(x) + jnp.exp(x), 3, 4),
        (lambda x: (x * x, 1.0), 1, 1),
        (lambda x: x, 0, 0),
        (lambda x: jax.jit(twice)(x) * x, 3, 3),
        (lambda x: own_rule(x) * x, 3, 3),
        (lambda x: jax.checkpoint(twice)(x) * x, 3, 3),
        (jax.grad(own_rule), 4, 6),  # 3 x, · x, · g, + 1; and x·x·x of the forward pass
        (lambda x: lax.cond(x * x > 1, twice, lambda x: x, x), 4, 4),  # x², the test, a branch
        (lambda x: lax.fori_loop(0, 5, lambda i, h: h * x, x), 5, 5),
        (lambda x: jnp.arange(4) * 2 + 1, 0, 0),  # no floats
    ],
)
def test_programs_one_can_see(program, depth, total):
    assert dependency_depth(program, ONE) == depth
    assert operations(program, ONE) == total


def test_whole_arrays_count_by_links_and_by_elements():
    assert dependency_depth(lambda v: v * v + 1, floats(6, 7)) == 2
    assert operations(lambda v: v * v + 1, floats(6, 7)) == 2 * 42
    assert dependency_depth(jnp.sum, floats(8)) == 3 and operations(jnp.sum, floats(8)) == 7
    assert dependency_depth(jnp.sum, floats(9)) == 4
    assert dependency_depth(jnp.dot, floats(4, 8), floats(8, 2)) == 1 + 3
    assert operations(jnp.dot, floats(4, 8), floats(8, 2)) == 4 * 2 * (8 + 7)
    assert dependency_depth(lambda v: lax.cumsum(v), floats(100)) == 7


def test_moving_numbers_is_free_and_so_is_interleaving():
    def shuffle(v):
        return jnp.concatenate([v[::-1].reshape(2, -1).T.ravel(), v[1:]])

    def interleave(even, odd):
        pads = [lax.pad(v, 0.0, [(k, 1 - k, 1)]) for k, v in enumerate((even, odd))]
        return pads[0] + pads[1]

    def overlap(one, two):
        return lax.pad(one, 0.0, [(0, 1, 1)]) + lax.pad(two, 0.0, [(0, 1, 1)])

    assert dependency_depth(shuffle, floats(8)) == operations(shuffle, floats(8)) == 0
    assert dependency_depth(interleave, floats(4), floats(4)) == 0
    assert dependency_depth(overlap, floats(4), floats(4)) == 1


def test_only_some_operations():
    def program(x):
        return jnp.exp(x * x) * x + 1

    assert dependency_depth(program, ONE, only={"mul"}) == operations(program, ONE, only={"mul"})
    assert dependency_depth(program, ONE, only={"exp"}) == 1


# A scan waits along its carry. Each body: (carry, x) -> (carry, y), of numbers.
BODIES = {
    "the step's own work waits for nothing": lambda h, x: (jnp.exp(x * x) * h + x, h),
    "nothing is carried on": lambda h, x: (x * x, h * x),
    "the output is the deepest": lambda h, x: (h + x, twice(h)),
    "a constant replaces the carry": lambda h, x: (jnp.float32(1), h * h * x),
    "nothing happens": lambda h, x: (h, h),
}
PAIRS = {
    "one feeds the other, a step late": lambda h, x: ((h[0] * x, h[0] + h[1]), h[1] * h[1]),
    "two that trade places": lambda h, x: ((h[1], h[0] * x), h[0]),
    "fast and slow": lambda h, x: ((twice(h[0]), jnp.exp(h[1])), h[0] * h[1]),
}


@pytest.mark.parametrize("length", [0, 1, 2, 3, 6, 7])
@pytest.mark.parametrize("name", [*BODIES, *PAIRS])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_as_deep_as_its_loop_written_out(name, length, reverse):
    body = {**BODIES, **PAIRS}[name]
    # the second carry starts behind a chain of its own
    h = (lambda v: (v, twice(v))) if name in PAIRS else (lambda v: v)

    def by_scan(v, xs):
        carry, ys = lax.scan(body, h(v), xs, reverse=reverse)
        return carry, ys.sum() if length else 0.0

    def by_hand(v, xs):
        carry, ys = h(v), []
        for t in reversed(range(length)) if reverse else range(length):
            carry, y = body(carry, xs[t])
            ys.append(y)
        return carry, jnp.stack(ys).sum() if ys else 0.0

    args = ONE, floats(length)
    assert dependency_depth(by_scan, *args) == dependency_depth(by_hand, *args)
    assert operations(by_scan, *args) == operations(by_hand, *args)


def test_loops_inside_loops():
    def outer(h, x):
        h, _ = lax.scan(lambda h, v: (h * v, None), h, jnp.exp(x))
        return h + 1, None

    def program(h, xs):
        return lax.scan(outer, h, xs)[0]

    # exp once, before the first product; then 5 products and a sum, four times
    assert dependency_depth(program, ONE, floats(4, 5)) == 1 + 4 * 6
    assert operations(program, ONE, floats(4, 5)) == 4 * (5 + 5 + 1)


@pytest.mark.parametrize("k", range(1, 13))
def test_the_scan_tree(k):
    def tree(a, b):
        return lax.associative_scan(combine, (a, b))[1]

    n = 2**k
    steps = floats(n), floats(n)
    assert dependency_depth(tree, *steps, only={"mul"}) == 2 * k - 1
    assert dependency_depth(tree, *steps) == 2 * (2 * k - 1)  # each multiplies, then adds
    assert operations(tree, *steps) == 3 * (2 * n - 2 - k)
    assert operations(tree, *steps, only={"mul"}) == 2 * (2 * n - 2 - k)


def test_selective_scan_is_as_deep_as_its_recurrence():
    def run(method, l):
        b, d, n = 1, 4, 2
        args = [floats(b, l, d)] * 2 + [floats(d, n)] + [floats(b, l, n)] * 2 + [floats(d)]
        return dependency_depth(
            lambda *args: selective_scan(*args, method=method), *args, only={"mul"}
        )

    assert run("sequential", 256) - run("sequential", 128) == 128  # one for each token
    assert run("associative", 256) - run("associative", 128) == 2  # one up, one down


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(NotImplementedError, match="while loop"):
        dependency_depth(lambda x: lax.while_loop(lambda v: v < 9, lambda v: v * v, x), ONE)
    with pytest.raises(NotImplementedError, match="how deep is 'sort'"):
        dependency_depth(jnp.sort, floats(8))
    with pytest.raises(NotImplementedError, match="kernel"):

        def kernel(x_ref, y_ref):
            y_ref[...] = x_ref[...] * 2

        operations(pl.pallas_call(kernel, out_shape=floats(8)), floats(8))


def test_bytes_moved():
    big, vector = floats(1024, 512), floats(512)  # 2 MiB and 2 KiB
    size = 2 * 2**20

    def move(fn, *args):
        return bytes_moved(fn, *args, on_chip=2**20)

    assert move(lambda a, b: a * b + 1, big, big) == 3 * size + 2 * size  # read, read, write; ...
    assert move(lambda v: v * v + 1, vector) == 0
    assert move(lambda a, v: a * v, big, vector) == 2 * size  # broadcasting is free
    assert move(lambda a: a.reshape(-1), big) == 0
    assert move(lambda a: a.T, big) == 2 * size
    assert move(lambda a: jax.jit(jnp.exp)(a), big) == 2 * size
    assert move(lambda a: a[:512], big) == 0  # 1 MiB: it fits
    assert move(lambda a: a[:768], big) == 2 * 3 / 4 * size
    assert move(lambda a: a.at[0].add(1.0), big) == 0
    assert move(lambda a, b: lax.dynamic_update_slice(a, b, (0, 0)), big, floats(768, 512)) == (
        2 * 3 / 4 * size
    )
    assert bytes_moved(lambda v: v * v, vector, on_chip=0) == 3 * 4 * 512


def test_a_scan_reads_its_inputs_and_writes_its_outputs_once():
    def program(h, xs):
        return lax.scan(lambda h, x: (h * x, h + x), h, xs)

    args = floats(512), floats(1024, 512)
    assert bytes_moved(program, *args, on_chip=2**20) == 2 * 2 * 2**20
    assert bytes_moved(program, *args, on_chip=2**22) == 0
