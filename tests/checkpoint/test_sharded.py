"""A checkpoint read onto several devices: the same numbers, each where it belongs, read once."""

import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mamba import Mamba, MambaConfig
from mamba.checkpoint import load
from mamba.checkpoint.names import tensor_table
from mamba.checkpoint.tensors import CheckpointError
from mamba.parallel import make_mesh, parameter_shardings
from tests.helpers.bin_files import write_bin
from tests.helpers.book import ROOT
from tests.helpers.parameters import random_params
from tests.helpers.training import environment

CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=24, d_state=4)
CODE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.checkpoint.test_sharded import load_on_four
print(json.dumps(load_on_four(*sys.argv[1:])))
"""


def load_on_four(*folders):
    """For each folder -> [parameters, shapes of the parts on device 0, numbers read]."""
    mesh, found = make_mesh(data=2, model=2), []
    for folder in folders:
        read, genuine = [0], load._convert

        def counting(values, spec, dtype, index, read=read, genuine=genuine):
            array, finite = genuine(values, spec, dtype, index)
            read[0] += array.size
            return array, finite

        load._convert = counting
        _, params = Mamba.from_pretrained(folder, shardings=partial(parameter_shardings, mesh=mesh))
        load._convert = genuine
        flat = flatten_dict(params, sep=".")
        parts = {name: v.addressable_shards[0].data.shape for name, v in flat.items()}
        found.append([{name: np.asarray(v).tolist() for name, v in flat.items()}, parts, read[0]])
    return found


def write_forms(folder):
    """The same random model as safetensors, and as .bin with the head repeated -> folders."""
    model = Mamba(CONFIG)
    params = random_params(model)
    model.save_pretrained(params, folder / "safetensors")
    (folder / "bin").mkdir()
    flat = flatten_dict(jax.tree.map(np.asarray, params), sep=".")
    arrays = {
        spec.name: (flat[spec.path].T if spec.transpose else flat[spec.path]).reshape(spec.shape)
        for spec in tensor_table(CONFIG, "embedding")
    }
    arrays["lm_head.weight"] = arrays["backbone.embedding.weight"]
    write_bin(folder / "bin" / "pytorch_model.bin", arrays)
    text = (folder / "safetensors" / "config.json").read_text()
    (folder / "bin" / "config.json").write_text(text)
    return flat, [str(folder / "safetensors"), str(folder / "bin")]


def test_on_four_devices(tmp_path):
    flat, folders = write_forms(tmp_path)
    command = [sys.executable, "-c", CODE, *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total = sum(v.size for v in flat.values())
    whole = sum(v.size for name, v in flat.items() if "norm" in name)  # on every device
    for params, parts, read in json.loads(done.stdout):
        assert params.keys() == flat.keys()
        for name, values in params.items():
            assert np.array_equal(np.float32(values), flat[name]), name
            cut = [n // p for n, p in zip(flat[name].shape, parts[name], strict=True)]
            assert cut.count(2) == (0 if "norm" in name else 1) and max(cut) <= 2, name
        assert read == 2 * (total - whole) + whole  # each half for two devices; a norm, once


def test_one_device(tmp_path):
    """Also there a sharding is followed, and a head that is not the embedding is refused."""
    flat, folders = write_forms(tmp_path)
    shardings = partial(parameter_shardings, mesh=make_mesh())
    for folder in folders:
        _, params = Mamba.from_pretrained(folder, shardings=shardings)
        for name, v in flatten_dict(params, sep=".").items():
            assert np.array_equal(v, flat[name])
    other = {"lm_head.weight": np.zeros((24, 8), np.float32)}
    names = {s.name: s for s in tensor_table(CONFIG, "embedding")}
    arrays = {n: np.ones(s.shape, np.float32) for n, s in names.items()}
    write_bin(tmp_path / "bin" / "pytorch_model.bin", arrays | other)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        Mamba.from_pretrained(tmp_path / "bin", shardings=shardings)
