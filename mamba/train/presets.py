"""The experiments of the book, by task and size."""

from mamba.train.experiment import Preset

__all__ = ["PRESETS"]

# "paper": Mamba, §4.1 and Appendix E.1 (its constant learning rates, no warm-up; no weight decay
# for induction heads, and none is stated for copying); for associative recall, sizes of Arora et
# al. (2023); for the language model, the 130m of Appendix E.2. "laptop": minutes on two cores.
# "minute": one layer, and less time.
_UNTIED = {"d_model": 64, "n_layer": 2, "tie_embeddings": False}  # learns sooner than a tied head
_COPY = {"vocab_size": 16, "n_data": 16}
_CONSTANT = {"warmup": 0.0, "end": 1.0, "evaluate_every": 5000}
# State tracking: blocks of nearly the same number of parameters. Every token counts, so time steps
# begin long. Rates are softplus's, because the others' fall too slowly: a count is kept for good.
_TRACKING = {
    "block": "mamba3",
    "model": {
        "d_model": 32,
        "n_layer": 1,
        "d_state": 16,
        "tie_embeddings": False,
        "dt_min": 0.5,
        "dt_max": 1.0,
    },
    "by_block": {
        "mamba2": {"head_dim": 16},
        "mamba3": {"head_dim": 16, "rope_fraction": 1.0, "heavy_tail": False},
    },
    "length": 160,
    "first_length": 10,
    "lengths": (40, 256, 512, 1024, 4096),
    "batch": 32,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "end": 0.0,
}
_TRACKING_LONG = _TRACKING | {"carry": 0.3, "full_length": 0.6}
_TRACKING_MORE = _TRACKING_LONG | {"model": _TRACKING["model"] | {"d_model": 64}, "steps": 2000}
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
    "parity": {
        "minute": Preset(task="parity", steps=600, sizes={"vocab_size": 2}, **_TRACKING),
        "laptop": Preset(task="parity", steps=4000, sizes={"vocab_size": 2}, **_TRACKING_LONG),
    },
    "modular-addition": {
        "laptop": Preset(task="modular-addition", sizes={"vocab_size": 5}, **_TRACKING_MORE),
    },
    "permutations": {
        "laptop": Preset(task="permutations", sizes={"vocab_size": 6}, **_TRACKING_MORE),
    },
    "language-model": {
        "minute": Preset(
            task="language-model",
            length=128,
            steps=300,
            batch=8,
            learning_rate=3e-3,
            sizes={"vocab_size": 1024},
            model={"d_model": 128, "n_layer": 2},
            carry=True,
        ),
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
