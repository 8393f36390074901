"""A model on a mesh of eight devices is the model on one: logits, states, losses, gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mamba import Mamba, MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.parallel import (
    AXES,
    apply_on_mesh,
    at_text_end,
    check_divides,
    last_logits_on_mesh,
    make_mesh,
    mean_loss,
    parameter_shardings,
)
from mamba_book.messages import messages as sent
from tests.helpers.many_devices import differences, on_devices
from tests.helpers.models import on_the_circle
from tests.helpers.parameters import random_params

SIZES = {"d_model": 8, "n_layer": 1, "vocab_size": 24, "d_state": 4}
CONFIGS = {
    "mamba": MambaConfig(**SIZES),
    "mamba2": Mamba2Config(**SIZES, head_dim=4, n_groups=2),
    "mamba3": Mamba3Config(**SIZES, head_dim=4, n_groups=2, d_intermediate=8),
}
MESHES = {"(8,)": (1, 8, 1), "(2, 4)": (2, 4, 1), "(2, 2, 2)": (2, 2, 2)}
B, L = 4, 32
LENGTHS = np.array([32, 5, 17, 0], np.int32)  # full, in the first stretch, just into one, empty
REAL = np.arange(L) < LENGTHS[:, None]  # (b, l)


def inputs(model):
    """Tokens, a state to continue from, resets, targets; all random."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 24, (2, B, L), np.int32)
    normal = lambda v: rng.normal(size=v.shape).astype(np.float32)  # noqa: E731
    state = jax.tree.map(normal, model.initial_state(B))
    resets = rng.random((B, L)) < 0.05
    resets[0, [7, 14, 26]] = True  # within the convolution's window of the next stretch
    return tokens, state, resets, targets


def everything(apply, model, params, gradient=True):
    """Logits at the real tokens, the state, the loss there and its gradient: one program."""
    tokens, state, resets, targets = inputs(model)

    def loss(params):
        logits, after = apply(params, tokens, state, LENGTHS, resets)
        log_p = jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, logits.shape[-1])
        return -jnp.where(REAL, log_p.sum(-1), 0).sum() / REAL.sum(), (logits, after)

    both = jax.value_and_grad(loss, has_aux=True)
    no = lambda params: (loss(params), ())  # noqa: E731
    (value, (logits, after)), grads = jax.jit(both if gradient else no)(params)
    return np.asarray(logits)[REAL], on_the_circle(jax.device_get(after)), value, grads


def measure():
    """Everything that needs eight devices, in one process."""
    found = {}
    for name, config in CONFIGS.items():
        model = Mamba(config)
        params = random_params(model)
        one = everything(lambda p, *args: model.apply({"params": p}, *args), model, params)  # noqa: B023
        for shape in MESHES.values():
            mesh = make_mesh(**dict(zip(AXES, shape, strict=True)))
            laid_out = jax.device_put(params, parameter_shardings(params, mesh))
            gradient = name != "mamba3" or shape == (2, 2, 2)  # its gradient takes long to compile
            apply = lambda p, *args: apply_on_mesh(model, mesh, p, *args)  # noqa: B023, E731
            many = everything(apply, model, laid_out, gradient)
            found[f"{name} {shape}"] = differences(many, one if gradient else (*one[:3], ()))
    found["last logits"] = last_logits()
    found["mean loss"] = losses()
    found["messages"] = [messages(l) for l in (64, 128)]
    return found


def last_logits():
    """Read by ``last_logits_on_mesh``, and by one device."""
    model, mesh = Mamba(CONFIGS["mamba"]), make_mesh(data=2, sequence=4)
    params, (tokens, state, _, _) = random_params(model), inputs(model)
    logits, after = last_logits_on_mesh(model, mesh, params, tokens, state, LENGTHS)
    variables, some = {"params": params}, LENGTHS > 0
    expected = model.apply(variables, tokens, state, LENGTHS, method="last_logits")
    return differences((logits[some], after), (expected[0][some], expected[1]))


def losses():
    """``mean_loss`` on the mesh and the gradient as it lies there, and from the logits."""
    model, mesh = Mamba(CONFIGS["mamba"]), make_mesh(data=2, sequence=2, model=2)
    params, (tokens, _, _, targets) = random_params(model), inputs(model)
    laid_out = jax.device_put(params, parameter_shardings(params, mesh))
    gradient = jax.jit(
        jax.value_and_grad(lambda p: mean_loss(model, mesh, p, tokens, targets, REAL))
    )
    (loss, grads), one = gradient(laid_out), make_mesh()
    assert grads["embedding"]["embedding"].sharding.spec == P("model")
    expected = jax.jit(
        jax.value_and_grad(lambda p: mean_loss(model, one, p, tokens, targets, REAL))
    )
    log_p = jax.nn.log_softmax(model.apply({"params": params}, tokens))
    nats = -np.take_along_axis(np.asarray(log_p), targets[..., None], -1)[..., 0]
    by_hand = nats[REAL].mean()
    return differences((loss, grads), expected(params)) | differences([loss], [by_hand])


def messages(l):
    """Of a forward pass of two layers over l tokens on eight devices."""
    model = Mamba(MambaConfig(**SIZES | {"n_layer": 2}))
    mesh, tokens = make_mesh(sequence=8), jnp.zeros((1, l), jnp.int32)
    run = jax.jit(lambda params, tokens: apply_on_mesh(model, mesh, params, tokens))
    return sent(run.lower(random_params(model), tokens).compile())


@pytest.fixture(scope="module")
def measured():
    return on_devices(8, "tests.test_parallel", "measure")


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mesh_gives_what_one_device_gives(measured, name, shape):
    """With padding, resets and a first state: loss, gradient, logits and state."""
    found = measured[f"{name} {shape}"]
    assert len(found) >= 4
    assert {k: v for k, v in found.items() if not v < 1e-5} == {}


def test_the_last_logits_are_those_of_one_device(measured):
    assert {k: v for k, v in measured["last logits"].items() if not v < 1e-5} == {}


def test_the_mean_loss_and_its_gradient_are_those_of_one_device(measured):
    assert {k: v for k, v in measured["mean loss"].items() if not v < 1e-5} == {}


def test_a_layer_sends_three_states_and_a_window_whatever_the_length(measured):
    short, long = measured["messages"]
    assert short == long
    d_inner, n = 16, 4
    states, window = (
        ["collective-permute", 4 * d_inner * 2 * n],
        ["collective-permute", 4 * d_inner * 3],
    )
    assert sorted(short) == sorted(2 * [*3 * [states], window])


# --- what one device can tell --------------------------------------------------------------------

DEVICES = [SimpleNamespace(shape=dict(zip(AXES, shape, strict=True))) for shape in MESHES.values()]


def test_a_mesh_that_does_not_divide_the_work_is_refused():
    with pytest.raises(ValueError, match="'data' of 2 devices does not divide 3 rows"):
        check_divides(DEVICES[1], (3, 8))
    with pytest.raises(ValueError, match="'sequence' of 8 devices does not divide 12 tokens"):
        check_divides(DEVICES[0], (1, 12))


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"1 × 64 × 2 needs 128 devices, and there are"):
        make_mesh(sequence=64, model=2)
    with pytest.raises(ValueError, match="sequence must be a number of devices, at least 1, got 0"):
        make_mesh(sequence=0)


def test_a_parameter_that_the_mesh_does_not_divide_is_refused():
    params = {"embedding": {"embedding": jnp.zeros((7, 2))}}
    with pytest.raises(ValueError, match=r"'model' of 2 .* embedding.embedding of shape \(7, 2\)"):
        parameter_shardings(params, DEVICES[2])


def test_the_state_is_that_of_the_stretch_that_holds_the_last_token():
    said = jnp.arange(8)[:, None] * 10 + jnp.arange(4)  # (stretches, b)
    ends = at_text_end(DEVICES[0], (4, 32), jnp.array([32, 5, 16, 0]), said)
    assert ends.tolist() == [70, 11, 32, 3]
    assert at_text_end(DEVICES[0], (4, 32), None, said).tolist() == [70, 71, 72, 73]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_a_block_is_cut_but_norms(name):
    """What a new generation adds must be given its place."""
    mesh = make_mesh()
    shardings = parameter_shardings(random_params(Mamba(CONFIGS[name])), mesh)
    whole = [
        jax.tree_util.keystr(path)
        for path, v in jax.tree_util.tree_leaves_with_path(shardings)
        if "model" not in v.spec
    ]
    assert [name for name in whole if "norm" not in name] == []
