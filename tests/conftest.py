"""Settings shared by all tests."""

from hypothesis import settings

# The first call of a jitted function compiles, which takes any time: no deadline. And the same
# examples on every run: a test that fails here fails there.
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")
