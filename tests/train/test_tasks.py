"""The synthetic tasks: the form of a batch, the places of the answers, and chance."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mamba.train.tasks import (
    Batch,
    associative_recall,
    copying,
    induction_heads,
    modular_addition,
    permutations,
    selective_copying,
)

# Every task at a small size: function with its sizes, length of a row, answers in a row, chance.
TASKS = {
    "selective": (partial(selective_copying, length=12, vocab_size=7, n_data=4), 16, 4, 1 / 5),
    "copying": (partial(copying, length=12, vocab_size=7, n_data=4), 16, 4, 1 / 5),
    "induction": (partial(induction_heads, length=12, vocab_size=7), 12, 1, 1 / 6),
    "recall": (partial(associative_recall, length=16, vocab_size=12, n_pairs=3), 16, 3, 1 / 6),
    "addition": (partial(modular_addition, length=12), 12, 12, 1 / 5),
    "parity": (partial(modular_addition, length=12, vocab_size=2), 12, 12, 1 / 2),
    "permutations": (partial(permutations, length=12), 12, 12, 1 / 6),
}
ROWS = 4000
every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module")
def batches():
    return {k: jax.tree.map(np.asarray, f(jax.random.key(0), ROWS)) for k, (f, *_) in TASKS.items()}


def assert_uniform(values, low, high):
    """All whole numbers low … high − 1 are equally likely: a chi² test at 1e-4."""
    counts = np.bincount(np.ravel(values) - low, minlength=high - low)
    assert len(counts) == high - low
    assert stats.chisquare(counts).pvalue > 1e-4


@every_task
def test_shapes_and_number_of_answers(batches, name):
    _, length, answers, _ = TASKS[name]
    batch = batches[name]
    assert [(v.shape, v.dtype) for v in batch] == [
        ((ROWS, length), np.int32),
        ((ROWS, length), np.int32),
        ((ROWS, length), bool),
    ]
    assert (batch.mask.sum(1) == answers).all()
    assert (batch.targets[~batch.mask] == 0).all()


@every_task
def test_chance_is_as_documented(batches, name):
    """All answers are equally likely, so no constant guess does better."""
    answers = batches[name].targets[batches[name].mask]
    chance = TASKS[name][3]
    assert_uniform(answers, answers.min(), answers.min() + round(1 / chance))


@every_task
def test_a_pure_function_of_the_key(batches, name):
    task = TASKS[name][0]
    again = task(jax.random.key(0), ROWS)
    assert all((a == b).all() for a, b in zip(again, batches[name], strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_two_keys_never_share_a_batch(name):
    """300 batches of two rows are all different, with keys as a training run makes them."""
    task = jax.jit(
        jax.vmap(lambda step: TASKS[name][0](jax.random.fold_in(jax.random.key(3), step), 2))
    )
    tokens = np.asarray(task(jnp.arange(300)).tokens)
    assert len({batch.tobytes() for batch in tokens}) == 300


# --- where the answers stand --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["selective", "copying"])
def test_copying_recalls_the_data_in_order(batches, name):
    tokens, targets, mask = batches[name]
    assert (tokens[:, 12:] == 6).all() and (mask == (np.arange(16) >= 12)).all()
    data = tokens[:, :12]
    assert ((0 <= data) & (data <= 5)).all() and ((data > 0).sum(1) == 4).all()
    in_order = data[data > 0].reshape(ROWS, 4)
    assert (targets[:, 12:] == in_order).all()
    assert_uniform(in_order, 1, 6)


def test_selective_copying_takes_any_places(batches):
    """All sets of places are equally likely: single places, and the pairs of a small task."""
    assert_uniform(np.nonzero(batches["selective"].tokens[:, :12])[1], 0, 12)
    tokens = np.asarray(selective_copying(jax.random.key(1), 6000, 4, n_data=2).tokens)
    first, second = np.nonzero(tokens[:, :4])[1].reshape(6000, 2).T
    pairs = {(0, 1): 0, (0, 2): 1, (0, 3): 2, (1, 2): 3, (1, 3): 4, (2, 3): 5}
    assert_uniform([pairs[p] for p in zip(first.tolist(), second.tolist(), strict=True)], 0, 6)


def test_copying_has_a_fixed_distance(batches):
    tokens, targets, _ = batches["copying"]
    assert (tokens[:, :4] > 0).all() and (tokens[:, 4:12] == 0).all()
    assert (targets[:, 12:] == tokens[:, :4]).all()


def test_induction_heads_ask_for_what_followed(batches):
    tokens, targets, mask = batches["induction"]
    assert (mask == (np.arange(12) == 11)).all()
    special = tokens == 6
    assert (special.sum(1) == 2).all() and special[:, 11].all()
    place = special.argmax(1)
    assert (targets[:, 11] == tokens[np.arange(ROWS), place + 1]).all()
    assert_uniform(place, 0, 10)  # the last possible: special, answer, special
    assert_uniform(tokens[~special], 0, 6)


def test_associative_recall_asks_for_every_key_once(batches):
    tokens, targets, mask = batches["recall"]
    keys, values = tokens[:, :6:2], tokens[:, 1:6:2]
    assert ((1 <= keys) & (keys <= 5)).all() and ((6 <= values) & (values <= 11)).all()
    assert all(len(set(row)) == 3 for row in keys.tolist())
    assert not mask[:, :6].any() and (tokens[:, 6:][~mask[:, 6:]] == 0).all()
    for row in range(200):
        value = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        asked = tokens[row][mask[row]].tolist()
        assert sorted(asked) == sorted(value)
        assert targets[row][mask[row]].tolist() == [value[k] for k in asked]
    assert_uniform(np.nonzero(mask)[1], 6, 16)
    assert_uniform(keys[:, 0], 1, 6)
    asked_first = tokens[np.arange(ROWS), mask.argmax(1)]
    assert_uniform((keys == asked_first[:, None]).argmax(1), 0, 3)  # in any order


@pytest.mark.parametrize(("name", "digits"), [("parity", 2), ("addition", 5)])
def test_addition_asks_for_the_sum_so_far(batches, name, digits):
    tokens, targets, _ = batches[name]
    assert_uniform(tokens, 0, digits)
    assert_uniform(
        tokens[:, -1] * digits + targets[:, -2], 0, digits**2
    )  # independent of each other
    for row in range(200):
        assert targets[row].tolist() == [
            s % digits for s in itertools.accumulate(tokens[row].tolist())
        ]


def test_permutations_ask_for_the_order_of_the_things(batches):
    """With three things and with four: each is moved by hand, one token after another."""
    four = jax.tree.map(np.asarray, permutations(jax.random.key(1), 200, 9, vocab_size=24))
    for n, (tokens, targets, _) in ((3, batches["permutations"]), (4, four)):
        every = list(itertools.permutations("abcd"[:n]))
        moves = list(itertools.permutations(range(n)))
        assert_uniform(tokens, 0, len(every))
        for row in range(200):
            things = every[0]
            for token, target in zip(tokens[row], targets[row], strict=True):
                things = tuple(things[place] for place in moves[token])
                assert things == every[target]


def test_the_order_of_two_permutations_matters():
    """Of permutations of three things, but not of two, nor of numbers that are added."""

    def commutes(task, **sizes):
        tokens, targets, _ = task(jax.random.key(2), 5000, 2, **sizes)
        result = dict(zip(map(tuple, tokens.tolist()), targets[:, 1].tolist(), strict=True))
        return all(result[a, b] == result[b, a] for a, b in result)

    assert commutes(modular_addition) and commutes(permutations, vocab_size=2)
    assert not commutes(permutations)


@pytest.mark.parametrize("task", [modular_addition, permutations])
def test_a_sequence_that_continues_another(task):
    """In parts, the last target of each handed on, it is one long sequence from the start."""
    before, tokens, targets = None, [], []
    for part in range(3):
        batch = task(jax.random.key(part), 50, 4, before=before)
        before = batch.targets[:, -1]
        tokens.append(batch.tokens), targets.append(batch.targets)
    tokens, targets = np.concatenate(tokens, 1), np.concatenate(targets, 1)
    size = 5 if task is modular_addition else 6
    moves = list(itertools.permutations(range(3)))
    number = {order: i for i, order in enumerate(moves)}
    step = {
        5: lambda s, t: (s + t) % 5,
        6: lambda s, t: number[tuple(moves[s][place] for place in moves[t])],
    }[size]
    for row in range(50):
        state = list(itertools.accumulate(tokens[row].tolist(), step, initial=0))[1:]
        assert state == targets[row].tolist()


# --- sizes --------------------------------------------------------------------------------------


def test_smallest_sizes():
    for task in (selective_copying, copying):
        tokens, targets, _ = task(jax.random.key(0), 3, 1, vocab_size=4, n_data=1)
        assert (tokens[:, 0] == targets[:, 1]).all() and (tokens[:, 1] == 3).all()
    tokens, targets, _ = induction_heads(jax.random.key(0), 3, 3, vocab_size=3)
    assert (tokens[:, [0, 2]] == 2).all() and (tokens[:, 1] == targets[:, 2]).all()
    batch = associative_recall(jax.random.key(0), 3, 3, vocab_size=4, n_pairs=1)
    for task in (modular_addition, permutations):
        tokens, targets, _ = task(jax.random.key(0), 3, 1, vocab_size=2)
        assert (tokens == targets).all()
    assert isinstance(batch, Batch) and (batch.targets[:, 2] == batch.tokens[:, 1]).all()


@pytest.mark.parametrize(
    ("task", "sizes", "message"),
    [
        (selective_copying, {"length": 15}, "length must be at least n_data = 16, got 15"),
        (selective_copying, {"batch": 0}, "batch must be at least 1, got 0"),
        (selective_copying, {"vocab_size": 3}, "vocab_size must be at least 4"),
        (selective_copying, {"n_data": 0}, "n_data must be at least 1, got 0"),
        (copying, {"length": 15}, "length must be at least n_data = 16, got 15"),
        (copying, {"vocab_size": 3}, "vocab_size must be at least 4"),
        (copying, {"batch": -1}, "batch must be at least 1, got -1"),
        (copying, {"n_data": 0}, "n_data must be at least 1, got 0"),
        (induction_heads, {"length": 2}, "length must be at least 3"),
        (induction_heads, {"vocab_size": 2}, "vocab_size must be at least 3"),
        (induction_heads, {"batch": 0}, "batch must be at least 1, got 0"),
        (associative_recall, {"length": 23}, "length must be at least 3 · n_pairs = 24, got 23"),
        (associative_recall, {"vocab_size": 15}, "vocab_size must be even"),
        (associative_recall, {"vocab_size": 16}, "n_pairs must be less than vocab_size / 2 = 8"),
        (associative_recall, {"n_pairs": 0}, "n_pairs must be at least 1, got 0"),
        (associative_recall, {"batch": 0}, "batch must be at least 1, got 0"),
        (modular_addition, {"length": 0}, "length must be at least 1, got 0"),
        (modular_addition, {"batch": 0}, "batch must be at least 1, got 0"),
        (modular_addition, {"vocab_size": 1}, "vocab_size must be at least 2"),
        (permutations, {"length": 0}, "length must be at least 1, got 0"),
        (permutations, {"batch": -1}, "batch must be at least 1, got -1"),
        (permutations, {"vocab_size": 1}, "vocab_size must be 2, 6, 24, 120 or another factorial"),
        (permutations, {"vocab_size": 7}, "another factorial, got 7"),
    ],
)
def test_bad_sizes(task, sizes, message):
    with pytest.raises(ValueError, match=message):
        task(jax.random.key(0), **{"batch": 2, "length": 64} | sizes)
