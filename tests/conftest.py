"""Settings shared by all tests."""

import signal

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


@pytest.fixture
def heeded():
    """Ctrl-C as in a terminal: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
