"""A scan over eight stretches is the scan over the whole text, with what may happen at a border."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mamba.scan import combine, selective_scan
from mamba.ssd import ssd
from mamba.stretches import Turned, join, join_turned, over_sequence
from mamba.trapezoid import TrapezoidState, trapezoidal_scan
from mamba_book.messages import messages as sent
from tests.helpers.many_devices import differences, on_devices

B, L, H, P_, N, G, R, S = 3, 40, 4, 3, 5, 2, 2, 2
CUT = P(None, "sequence")
DEFAULTS = {
    "selective_scan": ("sequential", "chunked", "associative"),
    "ssd": ("recurrence", "quadratic", "chunked"),
    "trapezoidal_scan": ("recurrence", "chunked"),
}


def cases():
    """{name: (scan, {argument: array}, names of those that are cut into stretches)}, none trivial.

    Row 0 has resets, row 1 ends within a stretch and has no token from then on, row 2 forgets all
    at one token (Δ A < −87), which lies in the middle of a stretch.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731

    def steps(*shape):
        delta = np.exp(rng.uniform(np.log(0.01), np.log(0.5), shape)).astype(np.float32)
        delta[1, L * 4 // 7 :] = 0
        delta[2, L // 2 + 2] = 1e3
        return delta

    resets = np.zeros((B, L), bool)
    resets[0, [L // 8, L // 2 + 1, L - 2]] = True  # the first at a border
    D = normal(H)
    selective = {"x": normal(B, L, H), "delta": steps(B, L, H), "A": -np.exp(normal(H, N))}
    selective |= {"B": normal(B, L, N), "C": normal(B, L, N), "D": D, "z": normal(B, L, H)}
    dual = {"x": normal(B, L, H, P_), "delta": steps(B, L, H), "A": -np.exp(normal(H))}
    dual |= {"B": normal(B, L, G, N), "C": normal(B, L, G, N), "D": D, "h0": normal(B, H, P_, N)}
    third = {"x": normal(B, L, H, R, P_), "delta": steps(B, L, H), "A": -np.exp(normal(B, L, H))}
    third["delta"][2, 1 : L // 3] *= rng.random((L // 3 - 1, H)) < 0.4  # padding may lie anywhere
    third |= {"lam": rng.random((B, L, H)).astype(np.float32), "theta": normal(B, L, H, S)}
    third |= {name: normal(B, L, H, R, N) for name in "BC"} | {"D": D}
    state = normal(B, H, S), normal(B, H, P_, N), normal(B, H, R, N), normal(B, H, R, P_)
    found = {
        "selective_scan": (selective_scan, selective | {"h0": normal(B, H, N)}),
        "ssd": (ssd, dual),
        "trapezoidal_scan": (trapezoidal_scan, third | {"state": TrapezoidState(*state)}),
    }
    whole = {"D", "h0", "state"}
    return {
        name: (scan, inputs, resets, inputs.keys() - whole - ({"A"} if name[0] != "t" else set()))
        for name, (scan, inputs) in found.items()
    }


def forward(scan, resets, inputs, **options):
    """y and the state, an angle as a point on the circle."""
    y, state = scan(**inputs, resets=resets, return_state=True, **options)
    if isinstance(state, TrapezoidState):
        state = state._replace(angle=jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle)], 1))
    return y, state


def with_gradients(function):
    """(inputs, resets) -> the outputs, and the gradients of a sum whose weights all differ."""

    def loss(inputs, resets):
        out = function(resets, inputs)
        weigh = lambda v: (jnp.sin(jnp.arange(v.size)).reshape(v.shape) * v).sum()  # noqa: E731
        return sum(map(weigh, jax.tree.leaves(out))), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def on_mesh(scan, names, inputs, n):
    """``forward`` on n devices, each with a stretch; the state is the last one's."""
    mesh = Mesh(np.array(jax.devices()[:n]), ("sequence",))
    specs = {name: CUT if name in names else P() for name in inputs}

    def on_one_device(resets, inputs):
        y, state = forward(over_sequence(scan, "sequence"), resets, inputs)
        last = jax.lax.axis_index("sequence") == n - 1
        own = lambda v: jax.lax.psum(jnp.where(last, v, 0), "sequence")  # noqa: E731
        return y, jax.tree.map(own, state)

    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(CUT, specs), out_specs=(CUT, P()))


def measure():
    """Everything that needs many devices, in one process."""
    found = {}
    for name, (scan, inputs, resets, names) in cases().items():
        expected = with_gradients(partial(forward, scan))(inputs, resets)
        many = on_mesh(scan, names, inputs, 8)
        found[name] = differences(with_gradients(many)(inputs, resets), expected)
        for method in DEFAULTS[name]:
            run = default_checks(scan, method, names, inputs)
            found[f"{name} {method}"] = differences(with_gradients(run)(inputs, resets), expected)
        found[f"{name} messages"] = messages(name)
    return found


def default_checks(scan, method, names, inputs):
    """``forward`` by a method, a row on each device, under the checks of ``shard_map`` itself."""
    mesh, rows = Mesh(np.array(jax.devices()[:B]), ("rows",)), P("rows")
    specs = {k: rows if k in names or k in ("h0", "state") else P() for k in inputs}
    run = partial(forward, partial(scan, method=method))
    return jax.shard_map(run, mesh=mesh, in_specs=(rows, specs), out_specs=(rows, rows))


def messages(name):
    """The collectives of a forward pass on 8 devices, for the outputs alone."""
    scan, inputs, resets, names = cases()[name]
    run = on_mesh(scan, names, inputs, 8)
    compiled = jax.jit(lambda *args: run(*args)[0]).lower(resets, inputs).compile()
    return sent(compiled)


@pytest.fixture(scope="module")
def measured():
    return on_devices(8, "tests.test_stretches", "measure")


@pytest.mark.parametrize("name", DEFAULTS)
def test_eight_stretches_are_one_text(measured, name):
    """Outputs, last state and all gradients; with resets, padding, forgetting and a first state."""
    assert len(measured[name]) >= 10
    assert {k: v for k, v in measured[name].items() if not v < 1e-5} == {}


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, methods in DEFAULTS.items() for method in methods]
)
def test_every_method_passes_the_default_checks_of_shard_map(measured, name, method):
    found = measured[f"{name} {method}"]
    # The methods round differently, above all at the token with the large step.
    assert {k: v for k, v in found.items() if not v < 2e-4} == {}


@pytest.mark.parametrize("name", DEFAULTS)
def test_three_messages_cross_the_borders_of_eight_devices(measured, name):
    """log₂ 8 permutations, whatever the length of the text."""
    element = {
        "selective_scan": H * 2 * N,
        "ssd": H * (1 + P_ * N),
        "trapezoidal_scan": H * (4 + S + P_ * N + R * N + R * P_),
    }[name]
    assert measured[f"{name} messages"] == [["collective-permute", 4 * B * element]] * 3


def test_over_no_axis_is_the_scan_itself():
    assert over_sequence(ssd, None) is ssd


def test_join_is_combine_where_something_is_left():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 2, 5)).astype(np.float32)
    for a, b in zip(
        join(tuple(left), tuple(right)), combine(tuple(left), tuple(right)), strict=True
    ):
        assert np.array_equal(a, b)


def test_nothing_is_left_of_a_state_that_decays_to_zero():
    a, h = join((np.float32(0.5), np.float32(np.nan)), (np.float32(0), np.float32(3)))
    assert (a, h) == (0, 3)


def test_turned_stretches_may_be_joined_in_any_order():
    rng = np.random.default_rng(0)

    def stretch(empty, anew):
        h, B_, x = (rng.normal(size=(1, 2, *s)) for s in ((P_, N), (R, N), (R, P_)))
        angle, a = rng.uniform(-3, 3, (1, 2, S)), np.full((1, 2), 0.0 if anew else 0.7)
        if empty:  # padding does nothing
            h, B_, x, angle, a = 0 * h, 0 * B_, 0 * x, 0 * angle, np.full((1, 2), 1.0 - anew)
        write = np.full((1, 2), 0.0 if empty else 0.3)
        floats = [v.astype(np.float32) for v in (a, write, angle, h, B_, x)]
        return Turned(*floats, np.full((1, 2), empty), np.full((1, 2), anew))

    both = partial(join_turned, "interleaved")
    for kinds in np.ndindex(2, 2, 2, 2, 2, 2):
        one, two, three = (stretch(*map(bool, kinds[i : i + 2])) for i in (0, 2, 4))
        left, right = both(both(one, two), three), both(one, both(two, three))
        if kinds[:2] == (1, 0) or not any(kinds[1::2]):  # else `write` is never read
            assert np.allclose(left.write, right.write)
        for name in ("a", "h", "B", "x", "empty", "anew"):
            assert np.allclose(getattr(left, name), getattr(right, name), atol=1e-5), (kinds, name)
        assert np.allclose(np.exp(1j * left.angle), np.exp(1j * right.angle), atol=1e-5)
