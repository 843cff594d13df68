"""The kernel is chosen by the device in one place, and what cannot be had is refused with its remedy."""

import subprocess
import sys

import pytest

from attention.native_kernel.backend import NativeAttentionBackend
from attention.select import create_backend
from attention.torch_kernel.backend import TorchAttentionBackend
from native.library import NativeLibrary
from tests.attention.reference import make_spec


def test_a_rank_on_a_cpu_takes_torch() -> None:
    assert isinstance(create_backend(make_spec()), TorchAttentionBackend)
    assert isinstance(create_backend(make_spec(), kind="torch"), TorchAttentionBackend)


def test_a_rank_on_a_cpu_that_has_native_kernels_takes_them_for_what_they_cover(library: NativeLibrary) -> None:
    assert isinstance(create_backend(make_spec(), library=library), NativeAttentionBackend)
    assert isinstance(create_backend(make_spec(), kind="torch", library=library), TorchAttentionBackend)
    assert isinstance(create_backend(make_spec(dtype="bfloat16"), library=library), TorchAttentionBackend)
    with pytest.raises(ValueError, match="takes float32 on cpu"):
        create_backend(make_spec(dtype="bfloat16"), kind="native", library=library)
    with pytest.raises(ValueError, match=r"has no library: it is not built, or engine\.kernels is torch"):
        create_backend(make_spec(), kind="native")


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown attention kernel 'flash': choose one of 'torch', 'native', 'flashinfer'"
    ):
        create_backend(make_spec(), kind="flash")


def test_a_library_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ImportError, match=r"FlashInfer cannot be imported .*`pip install 'muster\[gpu\]'`.*'torch'"):
        create_backend(make_spec(head_dim=64, dtype="bfloat16"), kind="flashinfer")


def test_choosing_torch_never_imports_flashinfer() -> None:
    program = "import attention.select, sys; sys.exit('flashinfer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
