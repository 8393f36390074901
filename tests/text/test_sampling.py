"""The filters and the draw, held against their definitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba.text.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalize, sample

DRAWS = 20_000
LOGITS = np.log(np.array([0.05, 0.4, 0.02, 0.2, 0.03, 0.3], np.float32))  # ranking 1 5 3 0 4 2


@functools.partial(jax.jit, static_argnames="n")
def draws(key, logits, n, sampling):
    """One token id for each of n keys: (n,). The temperature and min_p are traced."""
    return jax.vmap(lambda key: sample(key, logits, sampling))(jax.random.split(key, n))


def frequencies(logits, **settings):
    """How often each token is drawn, over many keys: (v,)."""
    ids = draws(jax.random.key(7), jnp.asarray(logits), DRAWS, Sampling(**settings))
    return np.bincount(np.asarray(ids), minlength=len(logits)) / DRAWS


def assert_drawn_as(logits, expected, **settings):
    """Chi-square against the expected probabilities, and never a token of probability 0."""
    expected = np.asarray(expected, np.float64) / np.sum(expected)
    found = frequencies(logits, **settings)
    assert (found[expected == 0] == 0).all()
    possible = expected > 0
    chi2 = DRAWS * ((found - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_temperature_divides_the_logits():
    for temperature in (0.5, 1.0, 2.0):
        assert_drawn_as(LOGITS, np.exp(LOGITS) ** (1 / temperature), temperature=temperature)


@pytest.mark.parametrize("settings", [{}, {"min_p": 0.2}, {"top_p": 0.9}])
def test_top_k_of_the_whole_vocabulary_is_none(settings):
    """Not only the same odds: the same token for the same key."""
    keys = jax.random.split(jax.random.key(0), 50)
    draw = lambda **kw: [int(sample(k, LOGITS, Sampling(**settings, **kw))) for k in keys]  # noqa: E731
    assert draw(top_k=len(LOGITS)) == draw(top_k=10**6) == draw(top_k=None)


def test_top_k_keeps_the_k_likeliest():
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0.2, 0, 0.3], top_k=3)
    assert_drawn_as(LOGITS, np.exp(LOGITS), top_k=1000)  # more than there are: no limit


def test_top_p_keeps_the_fewest_that_reach_p():
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0.2, 0, 0.3], top_p=0.75)  # 0.4 + 0.3 < 0.75
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0, 0, 0.3], top_p=0.69)  # 0.4 + 0.3 ≥ 0.69
    assert_drawn_as(LOGITS, np.exp(LOGITS), top_p=1.0)


def test_filters_compose_in_order():
    """Temperature first, then top-k, then top-p on what top-k left: 0.4, 0.3, 0.2 of 0.9."""
    assert_drawn_as(
        LOGITS, [0, 0.4, 0, 0.2, 0, 0.3], top_k=3, top_p=0.79
    )  # (0.4 + 0.3) / 0.9 < 0.79
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0, 0, 0.3], top_k=3, top_p=0.77)
    squared = [0, 0.16, 0, 0.04, 0, 0.09]  # at temperature 0.5, 0.16 / 0.29 = 0.552
    assert_drawn_as(LOGITS, squared, temperature=0.5, top_k=3, top_p=0.9)
    assert_drawn_as(LOGITS, [0, 1, 0, 0, 0, 0], temperature=0.5, top_k=3, top_p=0.55)


def test_min_p_keeps_what_is_likely_enough():
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0.2, 0, 0.3], min_p=0.45)  # at least 0.18
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0, 0, 0.3], min_p=0.55)  # at least 0.22
    assert_drawn_as(LOGITS, np.exp(LOGITS), min_p=0.0)
    assert_drawn_as(LOGITS, [0, 1, 0, 0, 0, 0], min_p=1.0)
    assert_drawn_as(np.zeros(6, np.float32), [1] * 6, min_p=1.0)  # equals all stay


def test_min_p_is_taken_of_what_the_other_filters_leave():
    """Measured at the temperature; after top-k and top-p, whose likeliest is the same one."""
    # At temperature 0.5 the odds are squared: 0.3 has (3/4)² = 0.56 of the likeliest, 0.2 has 0.25.
    assert_drawn_as(LOGITS, [0, 0.16, 0, 0, 0, 0.09], temperature=0.5, min_p=0.3)
    assert_drawn_as(LOGITS, [0, 0.16, 0, 0.04, 0, 0.09], temperature=0.5, min_p=0.2)
    # Top-k and top-p before: alone, top-p 0.75 keeps three; of those, min-p keeps two.
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0, 0, 0.3], top_k=5, top_p=0.75, min_p=0.6)
    # Were min-p first, 0.4 and 0.3 would remain, and top-p 0.55 of these would keep only 0.4.
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0, 0, 0.3], top_p=0.55, min_p=0.6)
    assert_drawn_as(LOGITS, [0, 0.4, 0, 0.2, 0, 0.3], top_k=3, min_p=0.1)


def test_keep_min_p():
    logits = jnp.array([[0.0, 3.0, 1.0, -jnp.inf], [5.0, 5.0, 4.0, 4.9]])
    kept = np.isfinite(np.asarray(keep_min_p(logits, 0.9)))
    assert kept.tolist() == [[False, True, False, False], [True, True, False, True]]
    np.testing.assert_array_equal(keep_min_p(logits, 0), logits)  # not even −inf changes


def test_penalize():
    """Divided if positive, multiplied if not: less likely either way, and only what was seen."""
    logits = jnp.array([2.0, -2.0, 2.0, -2.0, 0.0, -jnp.inf])
    seen = jnp.array([True, True, False, False, True, True])
    found = penalize(logits, seen, 4.0)
    np.testing.assert_array_equal(found, [0.5, -8.0, 2.0, -2.0, 0.0, -np.inf])
    np.testing.assert_array_equal(penalize(logits, seen, 1.0), logits)
    assert (penalize(logits, seen, 0.5)[:2] > logits[:2]).all()  # below 1 invites
    assert_drawn_as(  # p ∝ exp of the penalized logits
        np.asarray(penalize(jnp.array([1.0, -0.5, 0.3]), jnp.array([True, True, False]), 2.0)),
        np.exp([0.5, -1.0, 0.3]),
    )


def test_top_p_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    for p in (0.1, 0.5, 0.9, 0.99):
        logits = np.sort(rng.normal(size=(5, 40)).astype(np.float32) * 2)[:, ::-1].copy()
        kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), p)))
        for row, kept_row in zip(logits, kept, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            count, total = 0, 0.0
            while total < p:
                total += probabilities[count]
                count += 1
            assert kept_row.tolist() == [True] * count + [False] * (40 - count)


def test_top_p_keeps_at_least_one_and_all_at_one():
    def kept(logits, p):
        return np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), p))).tolist()

    steep = [50.0, 0.0, -50.0, -200.0]
    assert kept(steep, 1e-9) == [True, False, False, False]
    assert kept(steep, 1.0) == [True] * 4  # although the sum rounds to 1 long before the end
    assert kept([0.0] * 4, 0.5) == [True, True, False, False]  # two quarters are just enough


def test_ties_go_to_the_lower_id():
    equal = jnp.zeros(10)
    values, ids = keep_top_k(equal, 4)
    assert ids.tolist() == [0, 1, 2, 3] and values.tolist() == [0.0] * 4
    assert_drawn_as(np.zeros(10, np.float32), [1] * 4 + [0] * 6, top_k=4)
    assert np.isfinite(np.asarray(keep_top_p(equal, 0.45))).tolist() == [True] * 5 + [False] * 5
    tied = jnp.asarray([0.0, 2.0, 1.0, 2.0, 1.0])
    assert keep_top_k(tied, 3)[1].tolist() == [1, 3, 2]
    assert int(sample(None, tied, Sampling(temperature=0))) == 1


def test_a_single_survivor_is_the_greedy_choice():
    logits = jax.random.normal(jax.random.key(1), (8, 300))
    best = np.argmax(np.asarray(logits), axis=-1)
    key = jax.random.key(2)
    for settings in (
        {"top_k": 1},
        {"top_p": 1e-6},
        {"min_p": 1.0},
        {"temperature": 0},
        {"temperature": 1e-30},
    ):
        ids = sample(key, logits, Sampling(**settings))
        assert ids.dtype == jnp.int32 and ids.shape == (8,)
        np.testing.assert_array_equal(ids, best)


def test_forbidden_tokens_are_never_drawn():
    logits = np.where(np.arange(6) < 2, LOGITS, -np.inf)
    expected = [0.05, 0.4, 0, 0, 0, 0]
    assert_drawn_as(logits, expected, top_k=5)
    assert_drawn_as(logits, expected, top_p=0.999999)
    assert_drawn_as(logits, expected, min_p=0.0)
    assert_drawn_as(logits, expected, min_p=1e-30)


def test_rows_and_dtypes():
    """(v,) gives one id, (b, v) one per row; half precision is computed in float32."""
    key = jax.random.key(3)
    assert sample(key, jnp.asarray(LOGITS), Sampling()).shape == ()
    rows = jnp.stack([jnp.eye(6)[i] * 1e4 for i in (3, 0, 5)])
    assert sample(key, rows, Sampling(top_k=2, top_p=0.9)).tolist() == [3, 0, 5]
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    sampling = Sampling(top_k=3, top_p=0.8)
    expected = draws(key, low.astype(jnp.float32), 200, sampling)
    np.testing.assert_array_equal(draws(key, low, 200, sampling), expected)


def test_a_traced_temperature_gives_the_same_tokens():
    key, logits = jax.random.key(4), jnp.asarray(LOGITS)
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9)
    constant = jax.jit(lambda: draws.__wrapped__(key, logits, 50, sampling))()
    np.testing.assert_array_equal(draws(key, logits, 50, sampling), constant)


# --- Sampling as an argument of a compiled function -----------------------------------------------


def test_which_settings_are_values_and_which_compile():
    traced = []

    @jax.jit
    def function(sampling):
        traced.append(sampling)
        return sampling

    def compiled(*settings):
        """How many programs these settings need."""
        traced.clear()
        for each in settings:
            function(Sampling(**each))
        return len(traced)

    values = [{"temperature": t, "min_p": m} for t, m in ((0.5, 0.1), (1, 1), (2.0, 0.3))]
    assert compiled(*(v | {"repetition_penalty": 1 + v["temperature"]} for v in values)) == 1
    assert compiled({"temperature": 1}, {"temperature": 1.5}, {}) == 1
    assert compiled({"top_k": 1}, {"top_k": 2}, {"top_k": 2, "temperature": 3.0}) == 2
    assert compiled({"top_p": 0.1}, {"top_p": 0.2}, {"top_p": 0.2, "temperature": 3.0}) == 2
    assert compiled({"min_p": 0.5}) == compiled({"repetition_penalty": 2.0}) == 1  # now not None
    assert compiled({"temperature": 0}) == 1 and traced[0].greedy
    assert compiled({"temperature": 0.0}, {"temperature": 0, "min_p": 0}) == 0  # as before


def test_through_a_compiled_function_and_back():
    for settings in (
        {},
        {"temperature": 0, "top_k": 3},
        {"temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 2.0},
    ):
        sampling = Sampling(**settings)
        found = jax.jit(lambda sampling: sampling)(sampling)
        assert found == sampling and found.greedy == (settings.get("temperature") == 0)
    assert jax.tree.leaves(Sampling(temperature=0, top_k=3)) == []
    below = jax.tree.map(lambda value: -value, Sampling())  # -1: no Sampling, but a pytree
    assert below.temperature == -1


def test_what_changes_nothing_is_disabled():
    assert Sampling(top_p=1, min_p=0, repetition_penalty=1.0) == Sampling()
    assert Sampling() == Sampling(1.0, None, None, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().top_k = 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or a number from .* up, got -0.1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": float("inf")}, "temperature .* got inf"),
        ({"top_k": 0}, "top_k must be a whole number from 1 up, or None for all, got 0"),
        ({"top_k": 2.5}, "top_k .* got 2.5"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], or be None for no limit, got 0.0"),
        ({"top_p": 1.1}, "top_p .* got 1.1"),
        ({"top_p": float("nan")}, "top_p .* got nan"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], or be None for no limit, got -0.1"),
        ({"min_p": 1.1}, "min_p .* got 1.1"),
        ({"min_p": float("nan")}, "min_p .* got nan"),
        ({"temperature": 0, "top_k": -1}, "top_k .* got -1"),  # greedy does not hide a mistake
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    "function, value, message",
    [
        (keep_top_k, 0, "top_k must be a whole number from 1 up, or None for all, got 0"),
        (keep_top_p, 0.0, r"top_p must lie in \(0, 1\], or be None for no limit, got 0.0"),
        (keep_min_p, 1.1, r"min_p must lie in \[0, 1\], or be None for no limit, got 1.1"),
    ],
)
def test_a_filter_checks_its_own_argument(function, value, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.zeros(4), value)


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan"), float("inf")])
def test_a_penalty_out_of_range(penalty):
    with pytest.raises(ValueError, match="repetition_penalty must be a number above 0"):
        penalize(jnp.zeros(3), jnp.ones(3, bool), penalty)
    with pytest.raises(ValueError, match="repetition_penalty must be a number above 0"):
        Sampling(repetition_penalty=penalty)
