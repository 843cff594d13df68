"""Chooses the attention kernel by the rank's device: the one place that does."""

from attention.flashinfer_kernel.backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.native_kernel.backend import NativeAttentionBackend, covers
from attention.torch_kernel.backend import TorchAttentionBackend
from native.library import NativeLibrary

KINDS = ("torch", "native", "flashinfer")


def create_backend(
    spec: AttentionSpec, *, kind: str | None = None, library: NativeLibrary | None = None
) -> AttentionBackend:
    """The kernel of `kind` (one of KINDS); by default FlashInfer on cuda, and elsewhere the native one where there is a
    `library` and it covers the spec, else torch's.

    Raises ValueError where the kind is unknown or does not take the spec, ImportError where it is not installed.
    """
    chosen = kind or _default(spec, library)
    if chosen not in KINDS:
        raise ValueError(f"unknown attention kernel {chosen!r}: choose one of {', '.join(map(repr, KINDS))}")
    if chosen == "torch":
        return TorchAttentionBackend(spec)
    if chosen == "flashinfer":
        return FlashInferAttentionBackend(spec)
    if library is None:
        raise ValueError("the native attention kernel has no library: it is not built, or engine.kernels is torch")
    return NativeAttentionBackend(spec, library=library)


def _default(spec: AttentionSpec, library: NativeLibrary | None) -> str:
    if spec.device.type == "cuda":
        return "flashinfer"
    return "native" if library is not None and covers(spec) else "torch"
