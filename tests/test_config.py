"""What a configuration refuses: each field as its annotation says."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mamba import Mamba, MambaConfig


def config(**changes):
    return MambaConfig(**{"d_model": 8, "n_layer": 2, "vocab_size": 10} | changes)


@pytest.mark.parametrize("name", ["d_model", "n_layer", "d_state", "d_conv", "dt_rank", "expand"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, np.True_, "8", 2**31, float("nan")])
def test_a_size_is_a_whole_number(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["dt_min", "dt_max", "dt_init_floor", "norm_eps"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "0.1", None])
def test_a_setting_is_a_positive_number(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["bias", "conv_bias", "tie_embeddings"])
@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_a_choice_is_a_bool(name, value):
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        config(**{name: value})


@pytest.mark.parametrize("dtype", ["float33", int, jnp.int8, jnp.complex64, 3])
def test_a_dtype_is_floating_point(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        config(dtype=dtype)


def test_the_time_steps_are_in_order():
    with pytest.raises(ValueError, match="dt_min <= dt_max"):
        config(dt_min=0.2, dt_max=0.1)


def test_numpys_numbers_become_pythons():
    c = config(d_model=np.int64(8), norm_eps=np.float32(1e-5), bias=np.False_, dt_max=1)
    assert [type(v) for v in (c.d_model, c.norm_eps, c.bias, c.dt_max)] == [int, float, bool, float]
    json.dumps([c.d_model, c.norm_eps, c.bias])
    assert hash(c) == hash(config(norm_eps=float(np.float32(1e-5)), dt_max=1.0))


def test_what_a_configuration_admits_is_saved_and_loads_again(tmp_path):
    c = config(d_model=np.int32(8), norm_eps=1e-30, dt_min=1e-9, dt_init_floor=1e-12, dt_max=5)
    model = Mamba(c)
    params = model.init(jnp.array([0, 1], jnp.uint32), jnp.zeros((1, 1), jnp.int32))["params"]
    model.save_pretrained(params, tmp_path)
    loaded, _ = Mamba.from_pretrained(tmp_path)
    assert loaded.config == c
