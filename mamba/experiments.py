"""The experiments of the book: which task, at which sizes, trained how; and how one is run."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba import tasks
from mamba.block import MambaConfig
from mamba.loop import Trained, evaluate, make_optimizer, train
from mamba.model import Mamba

__all__ = ["PRESETS", "TASKS", "Preset", "Result", "evaluate_at", "run"]

TASKS = {
    "selective-copying": tasks.selective_copying,
    "copying": tasks.copying,
    "induction-heads": tasks.induction_heads,
    "associative-recall": tasks.associative_recall,
}
MOST_TOKENS = 2**24  # to evaluate at one length


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of a run.

    task: one of TASKS, or "language-model".   length: of the training sequences, as the task counts
    it.   sizes: what else the task takes.   warmup: part of the steps.   end: the last learning
    rate over the highest; 1 is constant.   model: fields of MambaConfig.   held_out: how many
    sequences to evaluate on, every ``evaluate_every`` steps and at the end.   lengths: where to
    evaluate at the end, apart from the training length.   first_length: of the first training
    sequences, or None: all are alike. It doubles, each length for as many steps, up to the last.
    """

    task: str
    length: int
    steps: int
    batch: int
    learning_rate: float
    sizes: Mapping
    model: Mapping = dataclasses.field(default_factory=lambda: {"d_model": 64, "n_layer": 2})
    warmup: float = 0.05
    end: float = 0.05
    weight_decay: float = 0.1
    held_out: int = 512
    evaluate_every: int = 500
    lengths: tuple = ()
    first_length: int | None = None

    def length_at(self, step):
        """How long the sequences of a step are: short at first, where an answer is found sooner."""
        first = self.first_length or self.length
        stretches = 1 + max(0, math.ceil(math.log2(self.length / first)))
        return min(self.length, first << int(step * stretches / self.steps))

    def config(self, selective=MambaConfig.selective, dtype="float32"):
        """The MambaConfig that this preset trains."""
        return MambaConfig(
            vocab_size=self.sizes["vocab_size"], selective=selective, dtype=dtype, **self.model
        )

    def optimizer(self):
        """AdamW with this preset's schedule, see ``loop.make_optimizer``."""
        return make_optimizer(
            self.learning_rate,
            self.steps,
            warmup=int(self.warmup * self.steps),
            end=self.end,
            weight_decay=self.weight_decay,
        )

    def draw(self, key, batch, length):
        """A ``tasks.Batch`` of this preset's task and sizes. Raises ValueError for bad sizes."""
        return TASKS[self.task](key, batch, length, **self.sizes)

    def held_out_batches(self, length):
        """Always the same sequences, whatever the seed of a run.

        ``held_out`` of them; fewer, at least 8, where they would have more than 2^24 tokens.
        """
        n = max(8, min(self.held_out, MOST_TOKENS // length))
        rows = min(n, self.batch)
        key = jax.random.fold_in(jax.random.key(0), 2)
        keys = [jax.random.fold_in(key, i) for i in range(-(-n // rows))]
        return [self.draw(key, rows, length) for key in keys]

    def settings(self, config):
        """All that defines a run but its seed, in types that JSON has."""
        model = dataclasses.asdict(config) | {"dtype": jnp.dtype(config.dtype).name}
        return dataclasses.asdict(self) | {"model": model}


# "paper": Mamba, §4.1 and Appendix E.1 (its constant learning rates, no warm-up; it does not give
# the weight decay); for associative recall, sizes of Arora et al. (2023); for the language model,
# the 130m of Appendix E.2. "laptop": minutes on two cores. "minute": less, with one layer.
_UNTIED = {"d_model": 64, "n_layer": 2, "tie_embeddings": False}  # a head of its own learns sooner
_COPY = {"vocab_size": 16, "n_data": 16}
_CONSTANT = {"warmup": 0.0, "end": 1.0, "evaluate_every": 5000}
_DOUBLING = tuple(2**k for k in range(6, 21))
PRESETS = {
    "selective-copying": {
        "minute": Preset(
            "selective-copying",
            *(64, 1000, 32, 1e-2),
            {"vocab_size": 16, "n_data": 4},
            {"d_model": 32, "n_layer": 1, "tie_embeddings": False},
            evaluate_every=1000,
        ),
        "laptop": Preset(
            "selective-copying",
            *(256, 6000, 16, 5e-3),
            _COPY,
            _UNTIED,
            first_length=32,
            held_out=256,
        ),
        "paper": Preset("selective-copying", 4096, 400_000, 64, 1e-4, _COPY, **_CONSTANT),
    },
    "copying": {
        "laptop": Preset("copying", 256, 4000, 64, 1e-3, _COPY),
        "paper": Preset("copying", 4096, 400_000, 64, 1e-4, _COPY, **_CONSTANT),
    },
    "induction-heads": {
        "laptop": Preset(
            "induction-heads",
            *(256, 1000, 16, 5e-3),
            {"vocab_size": 16},
            _UNTIED,
            first_length=16,
            evaluate_every=100,
            held_out=256,
            lengths=(64, 1024, 4096, 16384),
        ),
        "paper": Preset(
            "induction-heads",
            *(256, 204_800, 8, 1e-3),
            {"vocab_size": 16},
            lengths=_DOUBLING,
            **_CONSTANT,
        ),
    },
    "associative-recall": {
        "laptop": Preset(
            "associative-recall", 64, 4000, 64, 1e-3, {"vocab_size": 64, "n_pairs": 8}
        ),
        "paper": Preset(
            "associative-recall", 256, 100_000, 64, 1e-3, {"vocab_size": 8192, "n_pairs": 16}
        ),
    },
    "language-model": {
        "laptop": Preset(
            "language-model",
            *(256, 2400, 8, 2e-3),
            {"vocab_size": 4096},
            {"d_model": 256, "n_layer": 6},
        ),
        "paper": Preset(
            "language-model",
            *(2048, 4800, 256, 3e-3),
            {"vocab_size": 50257},
            {"d_model": 768, "n_layer": 24},
        ),
    },
}


class Result(NamedTuple):
    """What ``run`` returns."""

    model: Mamba
    trained: Trained  # parameters and curves


def run(preset, *, selective=MambaConfig.selective, seed=0, dtype="float32", **options):
    """Train on a synthetic task as the preset says -> Result.

    selective: which of "delta", "B", "C" look at the input, see MambaConfig.   seed: of parameters
    and training data.   dtype: of the matrix products.   options: folder, save_every, resume,
    progress, as ``loop.train`` takes them. Raises what that raises.
    """
    config = preset.config(selective, dtype)
    model, key = Mamba(config), jax.random.fold_in(jax.random.key(seed), 1)
    settings = preset.settings(config)
    del settings["lengths"]  # no part of the training: a finished run can be read at others, too
    trained = train(
        model,
        lambda step: preset.draw(
            jax.random.fold_in(key, step), preset.batch, preset.length_at(step)
        ),
        preset.optimizer(),
        preset.steps,
        seed=seed,
        held_out=preset.held_out_batches(preset.length),
        evaluate_every=preset.evaluate_every,
        settings=settings,
        **options,
    )
    return Result(model, trained)


def evaluate_at(preset, model, params, length):
    """Held-out sequences of any length, also far longer than those of the training.

    -> (loss in nats, accuracy, number of sequences), see ``Preset.held_out_batches``
    """
    batches = preset.held_out_batches(length)
    return *evaluate(model, params, batches), sum(len(batch.tokens) for batch in batches)
