"""The configuration and the parameters of our model -> a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mamba.checkpoint.files import sync_to_disk, write_atomically, write_tensors
from mamba.checkpoint.hub import CONFIG, WEIGHTS
from mamba.checkpoint.names import naming_of, tensor_table, write_config
from mamba.checkpoint.schema import ORIGINAL
from mamba.checkpoint.tensors import compare_tensors

__all__ = ["save_checkpoint"]


def save_checkpoint(config, params, folder, naming=None):
    """Write ``config.json`` and ``model.safetensors``. See ``Mamba.save_pretrained``."""
    if not isinstance(params, Mapping):
        raise TypeError(
            "save_pretrained(params, folder): params must be the dict of parameters, "
            f"got {type(params).__name__}"
        )
    naming = naming_of(config, naming)
    embedding = "embedding" if naming == ORIGINAL else "embeddings"
    specs, flat = tensor_table(config, embedding), flatten_dict(params, sep=".")
    compare_tensors(
        "params",
        {spec.path: (spec.our_shape, jnp.floating) for spec in specs},
        {path: (np.shape(leaf), jnp.result_type(leaf)) for path, leaf in flat.items()},
    )
    arrays = {}
    for spec in specs:
        array = np.asarray(flat[spec.path])
        arrays[spec.name] = array.T.reshape(spec.shape) if spec.transpose else array

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS[0]):
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder: save into another one")
    others = [name for name in WEIGHTS[1:] if (folder / name).exists()]
    if others:
        raise FileExistsError(f"{folder} holds {', '.join(others)}: save into another folder")
    with (  # the weights come last, because the block that is entered last ends first
        write_atomically(folder / CONFIG) as config_part,
        write_atomically(folder / WEIGHTS[0]) as weights_part,
    ):
        write_config(config_part, config, naming)
        write_tensors(weights_part, arrays)
        sync_to_disk(weights_part)  # a full disk shows here, while the old model is still whole
        # From here on the folder has no configuration, and so does not load, until all is in place.
        (folder / CONFIG).unlink(missing_ok=True)
        sync_to_disk(folder)
