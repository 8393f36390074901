"""A small random model, and a tokenizer for it, for the tests of reading and of states."""

import jax
import pytest

from mamba.mamba1 import MambaConfig
from mamba.mamba2 import Mamba2Config
from mamba.mamba3 import Mamba3Config
from mamba.model import Mamba
from mamba.text.generate import generate
from mamba.text.prompt import read_prompt
from mamba.train.corpus import train_tokenizer
from tests.helpers.parameters import random_params


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, without merges: to read a text in two parts is to read the same tokens."""
    return train_tokenizer([], 257)


SIZES = {"d_model": 16, "n_layer": 2, "vocab_size": 257, "d_state": 4}
SIZES |= {"pad_vocab_size_multiple": 8, "tie_embeddings": False}
# The head is not the embedding, or greedy text would repeat one token.
CONFIGS = {
    "mamba": MambaConfig(**SIZES),
    "mamba2": Mamba2Config(**SIZES, head_dim=8, n_groups=2),
    "mamba3": Mamba3Config(
        **SIZES | {"n_layer": 1}, head_dim=8, n_groups=2, is_mimo=True, mimo_rank=2
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """-> model, params, of each generation."""
    model = Mamba(CONFIGS[request.param])
    return model, random_params(model)


@pytest.fixture
def read(pair, tokenizer):
    """Read a prompt, or several, into a state."""
    model, params = pair
    return lambda prompt, state=None: read_prompt(
        model, params=params, tokenizer=tokenizer, prompt=prompt, state=state
    )


@pytest.fixture
def go_on(pair, tokenizer):
    """Continue a prompt, or several, by 12 tokens."""
    model, params = pair
    settings = {"params": params, "tokenizer": tokenizer, "key": jax.random.key(1)}
    settings |= {"n_tokens_to_gen": 12}
    return lambda prompt, **changes: generate(model, prompt=prompt, **(settings | changes))
