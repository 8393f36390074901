"""One model on many devices: a mesh, who holds which parameter, and a call on all of them.

    make_mesh(data=2, sequence=2, model=2)    rows × stretches of the text × heads or channels

Rows and stretches are cut by hand, with ``jax.shard_map``: each device runs the model on its part,
and the states cross the borders in ``mamba.stretches``. Along "model" each device holds a part of
the parameters (``parameter_shardings``), and JAX's compiler makes the messages.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mamba.checks import check_lengths, check_resets, check_state, check_tokens
from mamba.model import Mamba

__all__ = [
    "AXES",
    "apply_on_mesh",
    "at_text_end",
    "check_divides",
    "cut_axes",
    "last_logits_on_mesh",
    "lengths_here",
    "make_mesh",
    "mean_loss",
    "on_stretches",
    "over_mesh",
    "parameter_shardings",
]

AXES = ("data", "sequence", "model")
_SPLIT = {  # parameter: the axes of which the first that divides is cut along "model"
    "in_proj.kernel": (1, 0),  # by columns: each device has heads or channels of its own
    "in_proj.bias": (0,),
    "fc1.kernel": (1, 0),
    "out_proj.kernel": (0,),  # by rows: what the device's own heads contribute
    "fc2.kernel": (0,),
    "x_proj.kernel": (0,),
    "dt_proj.kernel": (1,),
    "dt_proj.bias": (0,),
    "conv1d.kernel": (1,),
    "conv1d.bias": (0,),
    "embedding.embedding": (0,),  # by tokens of the vocabulary
    "lm_head.kernel": (1,),
    "A_log": (0,),
    "D": (0,),
    "dt_bias": (0,),
    "B_bias": (0,),
    "C_bias": (0,),
    "mimo_x": (0,),
    "mimo_z": (0,),
    "mimo_o": (0,),
}


def make_mesh(*, data=1, sequence=1, model=1, devices=None):
    """Lay devices out in three axes, "data", "sequence" and "model".

    Args:
        data: parts of a batch's rows.
        sequence: stretches of every row.
        model: parts of the parameters; for more than 1, JAX 0.6 needs
            JAX_USE_SHARDY_PARTITIONER=1 in the environment.
        devices: a list of JAX devices; None: the first data · sequence · model of them.

    Raises:
        ValueError: a size that is no number of devices, or more devices than there are.
    """
    shape = (data, sequence, model)
    for axis, size in zip(AXES, shape, strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{axis} must be a number of devices, at least 1, got {size!r}")
    devices, needed = jax.devices() if devices is None else list(devices), math.prod(shape)
    if needed > len(devices):
        product = " × ".join(map(str, shape))
        raise ValueError(
            f"a mesh of {product} needs {needed} devices, and there are {len(devices)} (on a CPU, "
            'jax.config.update("jax_num_cpu_devices", n) makes n of them, before JAX starts)'
        )
    return jax.make_mesh(
        shape, AXES, devices=devices[:needed], axis_types=(AxisType.Auto,) * len(AXES)
    )


def parameter_shardings(params, mesh):
    """Which part of each parameter a device holds: a NamedSharding for each, in the same tree.

    in_proj is cut by columns, out_proj by rows, the embedding by tokens of its vocabulary; what
    belongs to a head or a channel lies where that is. Norms are on every device.

    Args:
        params: a model's parameters, or arrays' shapes in the same tree.
        mesh: from ``make_mesh``.

    Raises:
        ValueError: a parameter that the mesh's "model" axis does not divide.
    """
    parts, found = mesh.shape["model"], {}
    for name, v in flatten_dict(params, sep=".").items():
        axes = next((axes for end, axes in _SPLIT.items() if f".{name}".endswith(f".{end}")), ())
        fits = [axis for axis in axes if v.shape[axis] % parts == 0]
        if axes and not fits:
            raise ValueError(
                f"the mesh's axis 'model' of {parts} devices does not divide {name} of shape "
                f"{v.shape} along axis {axes[0]}"
            )
        spec = [None] * fits[0] + ["model"] if fits else []
        found[name] = NamedSharding(mesh, P(*spec))
    return unflatten_dict(found, sep=".")


def apply_on_mesh(model, mesh, params, tokens, state=None, lengths=None, resets=None):
    """``model.apply({"params": params}, tokens, state, lengths, resets)`` on all devices of a mesh.

    Every device has the rows of its place along "data", and of them the stretch of its place along
    "sequence". Logits, gradients and states are those of one device.

    Args:
        model: a ``Mamba``.
        mesh: from ``make_mesh``.
        params: its parameters, laid out by ``parameter_shardings`` (or in any other way).
        tokens: (b, l) integers. "data" divides b, "sequence" divides l.
        state: to continue from; None: begin, and return no state.
        lengths: (b,) true lengths of right-padded rows, or None.
        resets: (b, l) True where a new segment starts, or None.

    Returns:
        logits: (b, l, padded_vocab_size), cut as the tokens are; with a state, (logits, next
        state), whose rows lie along "data".

    Raises:
        ValueError: as ``Mamba``; b or l that the mesh does not divide; stretches shorter than the
            window of the convolution.
    """
    _check(model, mesh, tokens, state, lengths, resets)
    return _apply(model, mesh, params, tokens, state, lengths, resets)


def last_logits_on_mesh(model, mesh, params, tokens, state, lengths=None, resets=None):
    """As ``apply_on_mesh`` with a state, with the logits of each row's last real token only.

    So a text is read of which no device could hold all logits. -> logits (b, padded_vocab_size),
    next state
    """
    _check(model, mesh, tokens, state, lengths, resets)
    return _apply(model, mesh, params, tokens, state, lengths, resets, last=True)


@partial(jax.jit, static_argnames=("model", "mesh", "last"))
def _apply(model, mesh, params, tokens, state, lengths, resets, last=False):
    local, rows, cut = on_stretches(model, mesh), P("data"), P("data", "sequence")

    def on_one_device(params, tokens, *context):
        state, lengths, resets = context
        lengths = lengths_here(mesh, tokens, lengths)  # (b,)
        context = state, lengths, resets
        x, state = local.apply({"params": params}, tokens, *context, method="features")
        if last:
            at = jnp.maximum(tokens.shape[1] if lengths is None else lengths, 1) - 1
            x = x[jnp.arange(len(x)), at][None]  # (1, b, d_model)
        return x, jax.tree.map(lambda v: v[None], state)  # (b, l, d_model), (1, b, …)

    each = P("sequence", "data")  # what every stretch has to say about a row
    specs = (P(), cut, rows, rows, cut), (each if last else cut, each)
    run = over_mesh(on_one_device, mesh, *specs)
    x, states = run(params, tokens, state, lengths, resets)
    ends = partial(at_text_end, mesh, tokens.shape, lengths)
    logits = model.apply({"params": params}, ends(x) if last else x, method="logits")
    return logits if state is None else (logits, ends(states))


@partial(jax.jit, static_argnames=("model", "mesh"))
def mean_loss(model, mesh, params, tokens, targets, mask=None):
    """The mean cross-entropy in nats over the positions where the mask is True.

    Differentiable in the parameters; the gradient lies as they do.
    tokens, targets, mask: (b, l), cut as ``apply_on_mesh`` cuts tokens
    """
    check_divides(mesh, tokens.shape)
    local, cut = on_stretches(model, mesh), P("data", "sequence")

    def on_one_device(params, tokens, targets, mask):
        log_p = jax.nn.log_softmax(local.apply({"params": params}, tokens))  # (b, l, vocab)
        nats = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]  # (b, l)
        mask = jnp.ones_like(targets, bool) if mask is None else mask
        sums = jnp.stack([jnp.where(mask, nats, 0).sum(), mask.sum().astype(jnp.float32)])
        return jax.lax.psum(sums, cut_axes(mesh))

    run = over_mesh(on_one_device, mesh, (P(), cut, cut, cut), P())
    nats, scored = run(params, tokens, targets, mask)
    return nats / scored


# --- for those who write their own function of a device's part -----------------------------------


def cut_axes(mesh):
    """The axes of the mesh along which rows and texts are cut: of "data" and "sequence", those with
    more than one device."""
    return tuple(axis for axis in ("data", "sequence") if mesh.shape[axis] > 1)


def over_mesh(function, mesh, in_specs, out_specs):
    """``jax.shard_map`` along ``cut_axes``; what lies along "model" is left to the compiler.

    in_specs, out_specs: trees of PartitionSpecs with the axes "data" and "sequence"
    """
    axes = cut_axes(mesh)
    if not axes:
        return function
    own = lambda spec: P(*(axis if axis in axes else None for axis in spec))  # noqa: E731
    ins, outs = jax.tree.map(own, (in_specs, out_specs), is_leaf=lambda v: isinstance(v, P))
    return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, axis_names={*axes})


def on_stretches(model, mesh):
    """The model for one device inside ``over_mesh``: its scans cross the stretches of the mesh."""
    axis = "sequence" if mesh.shape["sequence"] > 1 else None
    return Mamba(model.config, axis, remat=model.remat)


def lengths_here(mesh, tokens, lengths):
    """How many tokens of each row lie in the device's own stretch, inside ``over_mesh``.

    tokens: (b, l), the stretch. lengths: (b,) of the rows; None: all tokens -> (b,), or None
    """
    stretches, l = mesh.shape["sequence"], tokens.shape[1]
    if lengths is None or stretches == 1:
        return lengths
    here = jnp.clip(lengths - jax.lax.axis_index("sequence") * l, 0, l)
    return jnp.where(lengths > stretches * l, lengths, here)  # too long: NaN, as on one device


def at_text_end(mesh, shape, lengths, tree):
    """Of what the device of every stretch says, (stretches, b, …), that of each row's last token.

    shape: (b, l) of the tokens. lengths: (b,) of the rows, or None. -> arrays (b, …)
    """
    b, l = shape
    lengths = jnp.full(b, l) if lengths is None else lengths
    stretch = jnp.maximum(lengths - 1, 0) * mesh.shape["sequence"] // l  # (b,)
    return jax.tree.map(lambda v: v[stretch, jnp.arange(b)], tree)


def check_divides(mesh, shape):
    """Raise ValueError unless the mesh divides the rows and the tokens of (b, l)."""
    for axis, size, of in (("data", shape[0], "rows"), ("sequence", shape[1], "tokens")):
        n = mesh.shape[axis]
        if size % n:
            raise ValueError(f"the mesh's axis {axis!r} of {n} devices does not divide {size} {of}")


def _check(model, mesh, tokens, state, lengths, resets):
    """What ``Mamba`` refuses, while values and whole shapes are known; and what does not divide."""
    check_tokens(tokens, model.config.padded_vocab_size)
    check_divides(mesh, tokens.shape)
    check_state(state, model.initial_state, tokens.shape[0])
    check_lengths(lengths, tokens.shape)
    check_resets(resets, tokens.shape)
