"""What a program waits for, computes and moves: counted on its jaxpr, without running it.

A jaxpr is JAX's record of a function: elementary operations, with the names of what they read and
write. The three functions here trace ``fn(*args)`` and count on that record:

    dependency_depth   operations in the longest chain in which each reads the result of the last
    operations         operations in total
    bytes_moved        bytes through main memory, if the operations ran one by one

Rules. An operation on whole arrays counts as one link of a chain, as on a machine with unlimited
lanes, and as one operation for each element. A sum over k elements is a tree: ceil(log2 k) links
and k − 1 operations; a contraction has one link, and k operations, more. What only moves or selects
numbers counts 0, and so does what touches no floats (indices). The arguments may be arrays or
``jax.ShapeDtypeStruct``: only their shapes matter.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

__all__ = ["bytes_moved", "chains", "dependency_depth", "operations", "repeated"]

VIEWS = {"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "stop_gradient"}
MOVES = VIEWS | {
    *("concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice"),
    *("dynamic_update_slice", "gather", "iota", "pad", "rev", "scatter", "select_n", "slice"),
    *("split", "stack", "transpose"),
}
ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "ceil", "clamp", "cos", "div", "eq", "erf", "exp", "exp2"),
    *("expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic"),
    *("lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "sign"),
    *("sin", "sqrt", "square", "sub", "tanh", "xor"),
}
# Of these only a part of the array moves: their result (-1), or the operand of this number.
PARTS = {"dynamic_slice": -1, "gather": -1, "slice": -1}
PARTS |= {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2}
REDUCTIONS = {"argmax", "argmin"} | {f"reduce_{name}" for name in ("max", "min", "prod", "sum")}
CUMULATIVE = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"}


def dependency_depth(fn, *args, only=None):
    """Operations in the longest chain of ``fn(*args)`` in which each needs the one before.

    A ``lax.scan`` of length l is not l times its body: what its body computes from the inputs of
    the step alone waits for nothing. Let M hold the longest chain from each input of the body to
    each output, −∞ where there is none: l steps are the l-th power of M, with max for + and + for ·

    only: names of primitives, {"mul"} for instance; then nothing else counts.
    Raises NotImplementedError for an operation of unknown depth: a while loop, whose number of
    rounds is not in the jaxpr (``lax.fori_loop`` with fixed bounds is fine), or a kernel.
    """
    longest = chains(_jaxpr(fn, args), only)
    return int(max(longest.max(initial=0), 0))


def operations(fn, *args, only=None):
    """Operations of ``fn(*args)`` in total, one for each element that is computed; see ``only``."""

    def own(eqn, interleaves):
        return 0 if _bodies(eqn) else _cost(eqn, only, interleaves)[1]

    return _sum(_jaxpr(fn, args), own)


def bytes_moved(fn, *args, on_chip=2**20):
    """Bytes that ``fn(*args)`` reads from and writes to main memory, operation by operation.

    Arrays of at most ``on_chip`` bytes stay on the chip and cost nothing; larger ones are read by
    every operation that uses them and written by the one that makes them. Reshaping and
    broadcasting are free, and of an array that is sliced or updated in part only that part moves.
    A compiler that fuses operations moves less: this is what the program asks for.
    """
    base = {}  # of a view: the bytes of what it views

    def size(v):
        full = math.prod(v.aval.shape) * v.aval.dtype.itemsize
        full = min(full, base.get(v, full)) if not isinstance(v, Literal) else 0
        return full if full > on_chip else 0

    def moved(eqn, _):
        name = eqn.primitive.name
        if name in VIEWS:
            base.update(dict.fromkeys(eqn.outvars, size(eqn.invars[0])))
            return 0
        reads, writes = eqn.invars, eqn.outvars
        if name in PARTS:
            part = (reads + writes)[PARTS[name]]
            reads, writes = [part] * any(map(size, reads)), [part]
        elif name == "scan":  # the body counts its own; here, a slice in and a slice out per step
            constants, carried = _held(eqn.params)
            reads, writes = reads[constants + carried :], writes[carried:]
        elif _bodies(eqn):
            return 0
        return sum(map(size, reads)) + sum(map(size, writes))

    return _sum(_jaxpr(fn, args), moved)


# --- the jaxpr ------------------------------------------------------------------------------------


def _jaxpr(fn, args):
    return jax.make_jaxpr(fn)(*args).jaxpr


def _bodies(eqn):
    """The jaxprs inside an operation: of a scan, a jitted or custom_vjp function, the branches."""
    name = eqn.primitive.name
    if name == "while":
        raise NotImplementedError(
            "the number of rounds of a while loop is not in the jaxpr: "
            "use lax.scan, or lax.fori_loop with fixed bounds"
        )
    if name == "pallas_call":
        raise NotImplementedError("a kernel orders its own operations: they cannot be counted here")
    found = eqn.params.get("branches", ())
    for key in ("jaxpr", "call_jaxpr"):
        found = found or ((eqn.params[key],) if key in eqn.params else ())
    return [getattr(body, "jaxpr", body) for body in found]


def _held(params):
    """How many inputs of a scan are constants, and how many are carried; the rest are its xs."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(list(constants)), len(list(carried))


def _walk(jaxpr):
    """The operations, each with: does it only interleave, as ``lax.associative_scan`` does?"""
    pads = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pad":
            pads[eqn.outvars[0]] = eqn
        operands = [None if isinstance(v, Literal) else pads.get(v) for v in eqn.invars]
        adds = eqn.primitive.name in ("add", "add_any") and None not in operands
        yield eqn, adds and _disjoint(*operands)


def _disjoint(one, two):
    """Do two zero-padded arrays occupy different places (say the even and the odd ones)?"""
    zero = all(isinstance(p.invars[1], Literal) and p.invars[1].val == 0 for p in (one, two))
    places = zip(one.params["padding_config"], two.params["padding_config"], strict=True)
    return zero and any(i == j and (lo - lo2) % (i + 1) for (lo, _, i), (lo2, _, j) in places)


def _cost(eqn, only, interleaves=False):
    """(links in a chain, operations) of one operation."""
    name = eqn.primitive.name
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    floats = any(jnp.issubdtype(getattr(a, "dtype", np.int32), jnp.inexact) for a in avals)
    out, first = math.prod(eqn.outvars[0].aval.shape), math.prod(avals[0].shape) if avals else 0
    if name in MOVES or interleaves or not floats or out == 0:
        return 0, 0
    if name in ELEMENTWISE:
        cost = 1, out
    elif name in REDUCTIONS:
        cost = math.ceil(math.log2(max(first // out, 1))), first - out
    elif name in CUMULATIVE:
        k = avals[0].shape[eqn.params["axis"]]
        cost = math.ceil(math.log2(k)), first - first // k
    elif name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        k = math.prod(avals[0].shape[axis] for axis in axes)
        cost = 1 + math.ceil(math.log2(max(k, 1))), out * (2 * k - 1)
    elif name == "scatter-add" and (eqn.params["unique_indices"] or avals[1].ndim < 2):
        cost = 1, math.prod(avals[2].shape)  # v.at[i].add(update)
    else:
        raise NotImplementedError(f"how deep is {name!r}? mamba_book.depth has no rule for it")
    return cost if only is None or name in only else (0, 0)


def _sum(jaxpr, own):
    """``own(eqn, interleaves)`` over all operations; the body of a scan as often as it runs."""
    total = 0
    for eqn, interleaves in _walk(jaxpr):
        inside = max((_sum(body, own) for body in _bodies(eqn)), default=0)
        total += inside * eqn.params.get("length", 1) + own(eqn, interleaves)
    return total


# --- chains: matrices over (max, +) ---------------------------------------------------------------


def chains(jaxpr, only):
    """The longest chain from each input (column) to each output (row), −∞ where there is none.

    The last column holds the chains that begin at a constant. only: as in ``dependency_depth``.
    """
    columns = len(jaxpr.invars) + 1
    start = np.where(np.eye(columns), 0.0, -np.inf)  # each input reaches itself by a chain of 0
    reach = dict(zip(jaxpr.invars, start)) | dict.fromkeys(jaxpr.constvars, start[-1])

    def reached(v):
        return start[-1] if isinstance(v, Literal) else reach[v]

    for eqn, interleaves in _walk(jaxpr):
        inputs = np.stack([*map(reached, eqn.invars), start[-1]])  # (inputs + 1, columns)
        bodies = [chains(body, only) for body in _bodies(eqn)]
        if eqn.primitive.name == "scan":
            out = _times(repeated(bodies[0], eqn.params), inputs)
        elif eqn.primitive.name == "cond":  # either branch, begun when the choice is known
            out = _times(np.max(bodies, axis=0), np.maximum(inputs[1:], inputs[0]))
        elif bodies:
            out = _times(bodies[0], inputs)
        else:
            out = [inputs.max(axis=0) + _cost(eqn, only, interleaves)[0]] * len(eqn.outvars)
        reach |= zip(eqn.outvars, out)
    return np.stack([reached(v) for v in jaxpr.outvars]) if jaxpr.outvars else start[:0]


def _times(left, right):
    """The product of two matrices over (max, +)."""
    return (left[:, :, None] + right[None]).max(axis=1)


def repeated(body, params):
    """The chains of a whole ``lax.scan``, from those of its body, given the scan's parameters."""
    (first, carried), length = _held(params), params["length"]
    outputs, inputs = body.shape  # (carry and ys) by (constants, carry, xs, 1)
    results = outputs - carried
    step = np.where(np.eye(inputs + results), 0.0, -np.inf)  # ys keep the longest chain so far
    step[first : first + carried, :] = -np.inf
    step[first : first + carried, :inputs] = body[:carried]
    step[inputs:, :inputs] = body[carried:]
    power = np.where(np.eye(len(step)), 0.0, -np.inf)
    while length:
        if length % 2:
            power = _times(step, power)
        step, length = _times(step, step), length // 2
    return np.concatenate([power[first : first + carried], power[inputs:]])[:, :inputs]
