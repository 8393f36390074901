"""Fixtures for tests of checkpoints."""

import pytest


@pytest.fixture
def path(tmp_path):
    """Where a test writes a file in PyTorch's format."""
    return tmp_path / "pytorch_model.bin"
