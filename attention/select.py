"""Chooses the attention kernel by the rank's device: the one place that does."""

from attention.flashinfer_kernel.backend import FlashInferAttentionBackend
from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_kernel.backend import TorchAttentionBackend

KINDS = ("torch", "flashinfer")


def create_backend(spec: AttentionSpec, *, kind: str | None = None) -> AttentionBackend:
    """The kernel of `kind` ("torch" or "flashinfer"), by default FlashInfer on cuda and torch elsewhere.

    Raises ValueError where the kind is unknown or does not take the spec, ImportError where it is not installed.
    """
    chosen = kind or ("flashinfer" if spec.device.type == "cuda" else "torch")
    if chosen not in KINDS:
        raise ValueError(f"unknown attention kernel {chosen!r}: choose one of {', '.join(map(repr, KINDS))}")
    if chosen == "torch":
        return TorchAttentionBackend(spec)
    return FlashInferAttentionBackend(spec)
