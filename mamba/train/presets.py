"""The experiments of the book: which task, at which sizes, trained how. ``run`` runs one."""

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

__all__ = ["BLOCKS", "PRESETS", "TASKS", "Preset", "Result", "evaluate_at", "run"]

TASKS = {
    "selective-copying": tasks.selective_copying,
    "copying": tasks.copying,
    "induction-heads": tasks.induction_heads,
    "associative-recall": tasks.associative_recall,
}
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
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    end: float = 0.05  # last learning rate / highest; 1: it is constant
    weight_decay: float = 0.1  # per unit of learning rate
    carry: bool = False  # whether a training sequence starts from the state after the one before
    held_out: int = 512  # sequences in an evaluation
    evaluate_every: int = 500  # steps between two evaluations; there is one at the end, too
    lengths: tuple = ()  # other lengths to evaluate at after the training
    first_length: int | None = None  # of the first training sequences; None: all have one length

    def length_at(self, step):
        """The length of the training sequences at a step.

        It doubles from first_length up to length, after equally many steps each time: in short
        sequences an answer is found sooner.
        """
        first = self.first_length or self.length
        n_lengths = 1 + max(0, math.ceil(math.log2(self.length / first)))
        doublings = int(step * n_lengths / self.steps)
        return min(self.length, first << doublings)

    def config(self, selective=SELECTIVE, dtype="float32"):
        """The configuration of the model: of its block, or an AblatedConfig for an ablation.

        Raises ValueError for an ablation of another block than Mamba's.
        """
        sizes = {"vocab_size": self.sizes["vocab_size"], "dtype": dtype, **self.model}
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

    def draw(self, key, batch, length):
        """A ``tasks.Batch`` of this preset's task and sizes. Raises ValueError for bad sizes."""
        return TASKS[self.task](key, batch, length, **self.sizes)

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
        # Runs of Mamba are saved as before there were other models, so that old saves resume.
        if self.block == "mamba":
            del settings["block"], model["select_norm_eps"]
        return settings


# "paper": Mamba, §4.1 and Appendix E.1 (its constant learning rates, no warm-up; no weight decay
# for induction heads, and none is stated for copying); for associative recall, sizes of Arora et
# al. (2023); for the language model, the 130m of Appendix E.2. "laptop": minutes on two cores.
# "minute": one layer, and less time.
_UNTIED = {"d_model": 64, "n_layer": 2, "tie_embeddings": False}  # learns sooner than a tied head
_COPY = {"vocab_size": 16, "n_data": 16}
_CONSTANT = {"warmup": 0.0, "end": 1.0, "evaluate_every": 5000}
PRESETS = {
    "selective-copying": {
        "minute": Preset(
            task="selective-copying",
            length=64,
            steps=1000,
            batch=32,
            learning_rate=1e-2,
            sizes={"vocab_size": 16, "n_data": 4},
            model={"d_model": 32, "n_layer": 1, "tie_embeddings": False},
            evaluate_every=1000,
        ),
        "laptop": Preset(
            task="selective-copying",
            length=256,
            steps=6000,
            batch=16,
            learning_rate=5e-3,
            sizes=_COPY,
            model=_UNTIED,
            held_out=256,
            first_length=32,
        ),
        "paper": Preset(
            task="selective-copying",
            length=4096,
            steps=400_000,
            batch=64,
            learning_rate=1e-4,
            sizes=_COPY,
            **_CONSTANT,
        ),
    },
    "copying": {
        "laptop": Preset(
            task="copying", length=256, steps=4000, batch=64, learning_rate=1e-3, sizes=_COPY
        ),
        "paper": Preset(
            task="copying",
            length=4096,
            steps=400_000,
            batch=64,
            learning_rate=1e-4,
            sizes=_COPY,
            **_CONSTANT,
        ),
    },
    "induction-heads": {
        "laptop": Preset(
            task="induction-heads",
            length=256,
            steps=1000,
            batch=16,
            learning_rate=5e-3,
            sizes={"vocab_size": 16},
            model=_UNTIED,
            held_out=256,
            evaluate_every=100,
            lengths=(64, 1024, 4096, 16384),
            first_length=16,
        ),
        "paper": Preset(
            task="induction-heads",
            length=256,
            steps=204_800,
            batch=8,
            learning_rate=1e-3,
            sizes={"vocab_size": 16},
            weight_decay=0.0,
            lengths=tuple(2**k for k in range(6, 21)),
            **_CONSTANT,
        ),
    },
    "associative-recall": {
        "laptop": Preset(
            task="associative-recall",
            length=64,
            steps=4000,
            batch=64,
            learning_rate=1e-3,
            sizes={"vocab_size": 64, "n_pairs": 8},
        ),
        "paper": Preset(
            task="associative-recall",
            length=256,
            steps=100_000,
            batch=64,
            learning_rate=1e-3,
            sizes={"vocab_size": 8192, "n_pairs": 16},
        ),
    },
    "language-model": {
        "laptop": Preset(
            task="language-model",
            length=256,
            steps=2400,
            batch=8,
            learning_rate=2e-3,
            sizes={"vocab_size": 4096},
            model={"d_model": 256, "n_layer": 6},
            carry=True,
        ),
        "paper": Preset(
            task="language-model",
            length=2048,
            steps=4800,
            batch=256,
            learning_rate=3e-3,
            sizes={"vocab_size": 50257},
            model={"d_model": 768, "n_layer": 24},
            carry=True,
        ),
    },
}


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

    def data(step):
        return preset.draw(jax.random.fold_in(key, step), preset.batch, preset.length_at(step))

    settings = preset.settings(config)
    del settings["lengths"]  # a finished run may be evaluated at other lengths: resume admits them
    trained = train(
        model,
        data,
        preset.optimizer(),
        preset.steps,
        seed=seed,
        carry=preset.carry,
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
