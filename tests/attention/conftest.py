"""The backends under test, each made from a spec."""

from functools import partial

import pytest

from attention.flashinfer_kernel.backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.native_kernel.backend import NativeAttentionBackend
from attention.torch_kernel.backend import TorchAttentionBackend
from native.library import NativeLibrary
from tests.attention import flashinfer_double
from tests.attention.reference import MakeBackend


def make_flashinfer(spec: AttentionSpec) -> AttentionBackend:
    """FlashInfer over its double, with a workspace fit for tests."""
    return FlashInferAttentionBackend(spec, library=flashinfer_double, workspace_bytes=1024)


@pytest.fixture(params=["torch", "native", "flashinfer"])
def make_backend(request: pytest.FixtureRequest, library: NativeLibrary) -> MakeBackend:
    """Every test that takes this runs once for each backend."""
    makers: dict[str, MakeBackend] = {
        "torch": TorchAttentionBackend,
        "native": partial(NativeAttentionBackend, library=library),
        "flashinfer": make_flashinfer,
    }
    return makers[request.param]
