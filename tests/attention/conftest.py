"""The backends under test, each made from a spec."""

import pytest

from attention.flashinfer_kernel.backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_kernel.backend import TorchAttentionBackend
from tests.attention import flashinfer_double
from tests.attention.reference import MakeBackend


def make_flashinfer(spec: AttentionSpec) -> AttentionBackend:
    """FlashInfer over its double, with a workspace fit for tests."""
    return FlashInferAttentionBackend(spec, library=flashinfer_double, workspace_bytes=1024)


@pytest.fixture(params=["torch", "flashinfer"])
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """Every test that takes this runs once for each backend."""
    return {"torch": TorchAttentionBackend, "flashinfer": make_flashinfer}[request.param]
