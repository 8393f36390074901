"""What several files of tests about training use."""

import pytest

from tests.helpers import training


@pytest.fixture(scope="session")
def whole():
    """The run that nothing interrupts."""
    return training.run()
