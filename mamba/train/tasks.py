"""Synthetic tasks that ask what a sequence model can remember, and whether it chooses.

Every task is a pure function of a ``jax.random`` key and of sizes. It is compiled, it draws a batch
of new sequences, and it says in which places an answer is due. Tokens are small integers:

    selective_copying    . . 3 . 7 . . . 5 . . | | |     recall what stood between the noise
    copying              3 7 5 . . . . . . . . | | |     the same from a fixed distance
    induction_heads      4 1 9 * 6 2 8 8 0 3 1 *         what followed * the last time?
    associative_recall   a 5 b 2 c 9 . . b . a . c       look up every key once
    modular_addition     3 1 4 0 2 2 1 3                 the sum so far, modulo 5: 3 4 3 3 0 2 3 1
    permutations         c a f b b d e a                 the product of the permutations so far

Sources: Mamba (Gu & Dao, 2023), §3.1, §4.1 and Figure 2; Arjovsky et al. (2016) for copying, Jing
et al. (2019) for its selective form; Olsson et al. (2022) for induction heads; Arora et al. (2023)
for associative recall with many queries (MQAR); Grazzi et al. (2024), Merrill et al. (2024) and
Mamba-3 (Lahoti et al., 2026) for the last two, which ask to track a state.
"""

import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Batch",
    "associative_recall",
    "copying",
    "induction_heads",
    "modular_addition",
    "permutations",
    "selective_copying",
]


class Batch(NamedTuple):
    """Sequences, the right answers, and where an answer is due."""

    tokens: jax.Array  # (b, l) int32
    targets: jax.Array  # (b, l) int32: the answer, where the mask is True; 0 elsewhere
    mask: jax.Array  # (b, l) bool


@partial(jax.jit, static_argnames=("batch", "length", "vocab_size", "n_data"))
def selective_copying(key, batch, length, *, vocab_size=16, n_data=16):
    """Data tokens at random places among noise; at the end, n_data markers ask for them in order.

    Sequences are ``length + n_data`` tokens long: noise (0) and data (1 … vocab_size − 2) on the
    first ``length`` places, any n_data of which are as likely to hold the data as any other; then
    the marker (vocab_size − 1), n_data times. The target at the i-th marker is the i-th data token.
    The distance from a token to its answer varies, so a model must skip the noise by what it is and
    not by where it is. Chance: 1 / (vocab_size − 2).
    -> Batch. Raises ValueError for sizes that hold no such sequence.
    """
    _check_sizes(batch=batch, n_data=n_data)
    _check(length >= n_data, f"length must be at least n_data = {n_data}, got {length}")
    place_key, data_key = jax.random.split(key)
    places = jnp.sort(_places(place_key, batch, length, n_data))  # (b, n_data)
    return _copying(data_key, places, length, vocab_size)


@partial(jax.jit, static_argnames=("batch", "length", "vocab_size", "n_data"))
def copying(key, batch, length, *, vocab_size=16, n_data=16):
    """The data first, then noise, then the markers: every answer is due ``length`` tokens later.

    Tokens, targets, sizes, chance and errors as in ``selective_copying``; only the places of the
    data are fixed: 0 … n_data − 1. One convolution, a shift by ``length``, solves the task.
    """
    _check_sizes(batch=batch, n_data=n_data)
    _check(length >= n_data, f"length must be at least n_data = {n_data}, got {length}")
    places = jnp.broadcast_to(jnp.arange(n_data), (batch, n_data))
    return _copying(key, places, length, vocab_size)


def _copying(key, places, length, vocab_size):
    _check(vocab_size >= 4, f"vocab_size must be at least 4 (two data tokens), got {vocab_size}")
    b, n_data = places.shape
    data = jax.random.randint(key, (b, n_data), 1, vocab_size - 1, jnp.int32)
    tokens = jnp.zeros((b, length + n_data), jnp.int32).at[:, length:].set(vocab_size - 1)
    tokens = tokens.at[jnp.arange(b)[:, None], places].set(data)  # (b, length + n_data)
    targets = jnp.zeros_like(tokens).at[:, length:].set(data)
    mask = jnp.broadcast_to(jnp.arange(length + n_data) >= length, tokens.shape)
    return Batch(tokens, targets, mask)


@partial(jax.jit, static_argnames=("batch", "length", "vocab_size"))
def induction_heads(key, batch, length, *, vocab_size=16):
    """Random tokens; somewhere a special one, and again at the end: which token followed it?

    Sequences of ``length`` tokens 0 … vocab_size − 2, with the special token (vocab_size − 1) at
    the end and at one place before, any of 0 … length − 3 with the same probability. The only
    answer is due at the last place: the token after the special one. Chance: 1 / (vocab_size − 1).
    -> Batch. Raises ValueError for sizes that hold no such sequence.
    """
    _check_sizes(batch=batch)
    _check(length >= 3, f"length must be at least 3 (special, answer, special), got {length}")
    _check(vocab_size >= 3, f"vocab_size must be at least 3 (two answers), got {vocab_size}")
    token_key, place_key = jax.random.split(key)
    tokens = jax.random.randint(token_key, (batch, length), 0, vocab_size - 1, jnp.int32)
    place = jax.random.randint(place_key, (batch,), 0, length - 2)
    rows = jnp.arange(batch)
    answer = tokens[rows, place + 1]  # (b,)
    tokens = tokens.at[rows, place].set(vocab_size - 1).at[:, -1].set(vocab_size - 1)
    targets = jnp.zeros_like(tokens).at[:, -1].set(answer)
    return Batch(tokens, targets, jnp.zeros(tokens.shape, bool).at[:, -1].set(True))


@partial(jax.jit, static_argnames=("batch", "length", "vocab_size", "n_pairs"))
def associative_recall(key, batch, length, *, vocab_size=64, n_pairs=8):
    """Pairs of key and value, then every key once more, anywhere: which value belonged to it?

    Sequences of ``length`` tokens: first n_pairs pairs, keys (1 … vocab_size/2 − 1, all different)
    and values (vocab_size/2 … vocab_size − 1); then filler (0), with each key at one place of its
    own, in any order. The target at such a place is the key's value. Chance: 2 / vocab_size.
    (Arora et al. draw those places so that near ones are likelier; here all are as likely.)
    -> Batch. Raises ValueError for sizes that hold no such sequence.
    """
    _check_sizes(batch=batch, n_pairs=n_pairs)
    _check(vocab_size % 2 == 0, f"vocab_size must be even: keys and values, got {vocab_size}")
    half = vocab_size // 2
    _check(n_pairs < half, f"n_pairs must be less than vocab_size / 2 = {half}, got {n_pairs}")
    least = 3 * n_pairs
    _check(length >= least, f"length must be at least 3 · n_pairs = {least}, got {length}")
    key_key, value_key, place_key = jax.random.split(key, 3)
    keys = 1 + _places(key_key, batch, half - 1, n_pairs)  # (b, n_pairs)
    values = jax.random.randint(value_key, (batch, n_pairs), half, vocab_size, jnp.int32)
    places = 2 * n_pairs + _places(place_key, batch, length - 2 * n_pairs, n_pairs)
    pairs = jnp.stack([keys, values], axis=2).reshape(batch, 2 * n_pairs)
    rows, empty = jnp.arange(batch)[:, None], jnp.zeros((batch, length), jnp.int32)
    tokens = empty.at[:, : 2 * n_pairs].set(pairs).at[rows, places].set(keys)  # (b, l)
    targets = empty.at[rows, places].set(values)
    return Batch(tokens, targets, targets > 0)


@partial(jax.jit, static_argnames=("batch", "length", "vocab_size"))
def modular_addition(key, batch, length, *, vocab_size=5, before=None):
    """Random digits; at every place, what is the sum so far, modulo vocab_size?

    Sequences of ``length`` tokens 0 … vocab_size − 1, all equally likely. The target at each place
    is the sum of its token and of all before it, modulo vocab_size. With vocab_size = 2 this is
    parity: is the number of ones so far odd? Every target depends on every token up to its place:
    without one of them, the others say nothing about it. Chance: 1 / vocab_size.
    before: (b,) sums of earlier sequences that these continue, or None. The targets have the same
    values whatever came before; only the first token depends on it.
    -> Batch. Raises ValueError for sizes that hold no such sequence.
    """
    _check_sizes(batch=batch, length=length)
    _check(vocab_size >= 2, f"vocab_size must be at least 2 (two digits), got {vocab_size}")
    states = jax.random.randint(key, (batch, length), 0, vocab_size, jnp.int32)
    return _tracking(states, before, lambda last, state: (state - last) % vocab_size)


@partial(jax.jit, static_argnames=("batch", "length", "vocab_size"))
def permutations(key, batch, length, *, vocab_size=6, before=None):
    """Random rearrangements of n things; at every place, in which order do the things stand?

    Sequences of ``length`` tokens 0 … vocab_size − 1, all equally likely. They are the
    vocab_size = n! permutations of n things, in the order of ``itertools.permutations``; the first
    one changes nothing. The token j turns the order s into s[j[0]], s[j[1]], …; the target at each
    place is the number of the order after its token. From n = 3 on, it matters which of two
    permutations comes first. (Merrill et al. ask for n = 5.) Chance: 1 / vocab_size.
    before: (b,) orders after earlier sequences that these continue, or None, see
    ``modular_addition``.
    -> Batch. Raises ValueError for sizes that hold no such sequence.
    """
    _check_sizes(batch=batch, length=length)
    quotients = jnp.argsort(_products(vocab_size), axis=1)  # [i, k]: the j that turns i into k
    states = jax.random.randint(key, (batch, length), 0, vocab_size, jnp.int32)
    return _tracking(states, before, lambda last, state: quotients[last, state].astype(jnp.int32))


def _tracking(states, before, token):
    """The Batch in which every target is the state at its place. states: (b, l).

    before: (b,) states before the first token; None: 0.   token: a function of two states in a row,
    -> the token that leads from one to the other.
    """
    before = jnp.zeros_like(states[:, 0]) if before is None else before
    last = jnp.concatenate([before[:, None], states[:, :-1]], axis=1)  # (b, l)
    return Batch(token(last, states), states, jnp.ones(states.shape, bool))


def _products(size):
    """Number of the order that permutation j makes of order i, at [i, j]: (n!, n!), n! = size."""
    n = next(n for n in itertools.count(2) if math.factorial(n) >= size)
    message = f"vocab_size must be 2, 6, 24, 120 or another factorial, got {size}"
    _check(size == math.factorial(n), message)
    orders = np.array(list(itertools.permutations(range(n))))  # (n!, n)
    digits = n ** np.arange(n)[::-1]  # an order as a number of n digits: larger for a later order
    return np.searchsorted(orders @ digits, orders[:, orders] @ digits)


def _places(key, batch, length, n):
    """n different places among ``length``, in random order, for every row: (b, n) int32."""
    every = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return jax.random.permutation(key, every, axis=1, independent=True)[:, :n]


def _check_sizes(**sizes):
    for name, size in sizes.items():
        _check(size >= 1, f"{name} must be at least 1, got {size}")


def _check(condition, message):
    if not condition:
        raise ValueError(message)
