"""The backends under test, each made from a spec."""

import pytest

from attention.torch_backend import TorchAttentionBackend
from tests.attention.reference import MakeBackend


@pytest.fixture(params=["torch"])
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """Every test that takes this runs once for each backend."""
    return TorchAttentionBackend
