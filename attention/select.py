"""Chooses the attention kernel by the rank's device: the one place that does."""

from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_backend import TorchAttentionBackend


def create_backend(spec: AttentionSpec, *, kind: str | None = None) -> AttentionBackend:
    """The kernel of `kind` ("torch" or "flashinfer"), by default FlashInfer on cuda and torch elsewhere."""
    if kind is None:
        kind = "flashinfer" if spec.device.type == "cuda" else "torch"
    if kind == "torch":
        return TorchAttentionBackend(spec)
    from attention.flashinfer_backend import FlashInferAttentionBackend

    return FlashInferAttentionBackend(spec)
