"""One experiment: a task, its sizes, the model, how it is trained. ``run`` runs it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba.mamba1 import MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.model import Mamba
from mamba.train import tasks
from mamba.train.ablation import SELECTIVE, AblatedConfig
from mamba.train.loop import Trained, train
from mamba.train.metrics import evaluate
from mamba.train.optimizer import make_optimizer

__all__ = ["BLOCKS", "TASKS", "Preset", "Result", "evaluate_at", "run"]

TASKS = {
    "selective-copying": tasks.selective_copying,
    "copying": tasks.copying,
    "induction-heads": tasks.induction_heads,
    "associative-recall": tasks.associative_recall,
    "parity": tasks.modular_addition,
    "modular-addition": tasks.modular_addition,
    "permutations": tasks.permutations,
}
STATE_TRACKING = ("parity", "modular-addition", "permutations")  # a sequence can continue another
BLOCKS = {"mamba": MambaConfig, "mamba2": Mamba2Config, "mamba3": Mamba3Config}
MAX_HELD_OUT_TOKENS = 2**24  # in the held-out sequences of one length
MIN_HELD_OUT_SEQUENCES = 8  # of one length, also where they have more tokens than that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a run."""

    task: str  # one of TASKS, or "language-model"
    length: int  # of the training sequences, as the task counts it
    steps: int  # of training
    batch: int  # sequences in a step
    learning_rate: float  # the highest
    sizes: Mapping  # the task's other arguments; the model has the same vocab_size
    block: str = "mamba"  # one of BLOCKS
    model: Mapping = dataclasses.field(  # fields of its configuration
        default_factory=lambda: {"d_model": 64, "n_layer": 2}
    )
    by_block: Mapping = dataclasses.field(default_factory=dict)  # block -> more of its fields
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    end: float = 0.05  # last learning rate / highest; 1: it is constant
    weight_decay: float = 0.1  # per unit of learning rate
    carry: float = False  # how many of the training sequences continue the ones before; True: all
    held_out: int = 512  # sequences in an evaluation
    evaluate_every: int = 500  # steps between two evaluations; there is one at the end, too
    lengths: tuple = ()  # other lengths to evaluate at after the training
    first_length: int | None = None  # of the first training sequences; None: all have one length
    full_length: float | None = None  # share of the steps at full length; None: as each other has

    def length_at(self, step):
        """The length of the training sequences at a step.

        It doubles from first_length up to length, after equally many steps each time (the full
        length may have more): in short sequences an answer is found sooner.
        """
        first = self.first_length or self.length
        n_shorter = max(0, math.ceil(math.log2(self.length / first)))
        n, share = n_shorter + 1, 1  # lengths that have equally many steps, and their share
        if self.full_length is not None:
            n, share = n_shorter, 1 - self.full_length
        doublings = int(step * n / (share * self.steps))
        return min(self.length, first << doublings)

    def config(self, selective=SELECTIVE, dtype="float32"):
        """The configuration of the model: of its block, or an AblatedConfig for an ablation.

        Raises ValueError for an ablation of another block than Mamba's.
        """
        sizes = {"vocab_size": self.sizes["vocab_size"], "dtype": dtype}
        sizes |= self.by_block.get(self.block, {}) | self.model
        if set(selective) == set(SELECTIVE):
            return BLOCKS[self.block](**sizes)
        if self.block != "mamba":
            raise ValueError(f"only Mamba's block can be ablated, not that of {self.block}")
        return AblatedConfig(**sizes, selective=selective)

    def optimizer(self):
        """AdamW with this preset's schedule, see ``make_optimizer``."""
        return make_optimizer(
            self.learning_rate,
            self.steps,
            warmup=int(self.warmup * self.steps),
            end=self.end,
            weight_decay=self.weight_decay,
        )

    def draw(self, key, batch, length, **before):
        """A ``tasks.Batch`` of this preset's task and sizes. Raises ValueError for bad sizes.

        before: of the tasks that track a state, see ``tasks.modular_addition``.
        """
        return TASKS[self.task](key, batch, length, **self.sizes, **before)

    def held_out_batches(self, length):
        """The held-out sequences of a length. They are the same for every seed of a run.

        There are ``held_out`` of them, rounded up to whole batches. If these would have more than
        2^24 tokens, there are fewer, but at least 8.
        """
        n = max(MIN_HELD_OUT_SEQUENCES, min(self.held_out, MAX_HELD_OUT_TOKENS // length))
        rows = min(n, self.batch)
        key = jax.random.fold_in(jax.random.key(0), 2)
        keys = [jax.random.fold_in(key, i) for i in range(-(-n // rows))]
        return [self.draw(key, rows, length) for key in keys]

    def settings(self, config):
        """Everything that defines a run but its seed, in types that JSON has -> dict."""
        model = {"selective": SELECTIVE} | dataclasses.asdict(config)
        model["dtype"] = jnp.dtype(config.dtype).name
        settings = dataclasses.asdict(self) | {"model": model}
        del settings["by_block"]  # what it says of this block is in the model
        # Runs of Mamba are saved as before there were other models, so that old saves resume.
        if self.block == "mamba":
            del settings["block"], model["select_norm_eps"]
        if self.full_length is None:
            del settings["full_length"]
        return settings


class Result(NamedTuple):
    """What ``run`` returns."""

    model: Mamba  # the model that was trained
    trained: Trained  # its parameters, and the curves


def run(preset, *, selective=SELECTIVE, seed=0, dtype="float32", **options):
    """Train a model on a synthetic task, as the preset says.

    Args:
        preset: a Preset.
        selective: which of "delta", "B" and "C" depend on the input.
        seed: of the parameters and the training data.
        dtype: of the matrix products.
        options: ``folder``, ``save_every``, ``resume`` and ``progress``, as ``train`` takes them.

    Returns:
        A Result.

    Raises:
        ValueError: other names in ``selective``. And whatever ``train`` raises.
    """
    config = preset.config(selective, dtype)
    model, key = Mamba(config), jax.random.fold_in(jax.random.key(seed), 1)

    def draw(step, **before):
        length = preset.length_at(step)
        return preset.draw(jax.random.fold_in(key, step), preset.batch, length, **before)

    def continues(step):  # (b,) bool: which rows of the batch do
        chosen = jax.random.fold_in(jax.random.fold_in(key, step), 1)
        return jax.random.bernoulli(chosen, float(preset.carry) if step else 0.0, (preset.batch,))

    def data(step):
        if not preset.carry or not step or preset.task not in STATE_TRACKING:
            return draw(step)
        last = draw(step - 1).targets[:, -1]  # the same whatever came before it
        return draw(step, before=jnp.where(continues(step), last, 0))

    settings = preset.settings(config)
    del settings["lengths"]  # a finished run may be evaluated at other lengths: resume admits them
    trained = train(
        model,
        data,
        preset.optimizer(),
        preset.steps,
        seed=seed,
        carry=preset.carry if isinstance(preset.carry, bool) else continues,
        held_out=preset.held_out_batches(preset.length),
        evaluate_every=preset.evaluate_every,
        settings=settings,
        **options,
    )
    return Result(model, trained)


def evaluate_at(preset, model, params, length):
    """Evaluate on held-out sequences of any length, also far longer than those of the training.

    Args:
        preset: the Preset of the run.
        model: the model that was trained.
        params: its parameters.
        length: of the sequences, as the task counts it.

    Returns:
        loss in nats, accuracy in 0 … 1, number of sequences.
    """
    batches = preset.held_out_batches(length)
    return *evaluate(model, params, batches), sum(len(batch.tokens) for batch in batches)
