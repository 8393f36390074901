"""A preset that trains in a moment."""

from mamba.train.experiment import Preset

TINY = Preset(
    task="selective-copying",
    length=6,
    steps=12,
    batch=4,
    learning_rate=1e-3,
    sizes={"vocab_size": 8, "n_data": 2},
    model={"d_model": 8, "n_layer": 1, "d_state": 4},
    held_out=10,
    evaluate_every=5,
    lengths=(9,),
)
