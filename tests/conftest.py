"""Settings shared by all tests."""

import jax
import pytest
from hypothesis import settings

# The first call of a jitted function compiles, which takes any time: no deadline. And the same
# examples on every run: a test that fails here fails there.
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")


@pytest.fixture
def double():
    """float64 inside: a wrong formula cannot hide behind float32's rounding."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
