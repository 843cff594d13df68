"""Mixtral's layers: Llama's attention, and experts in place of the feed-forward."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer, decoder_layer, feed_forward_norm


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    prefix = f"model.layers.{layer}.block_sparse_moe"
    experts = parts.experts(
        layer=layer,
        norm=feed_forward_norm(parts, layer=layer),
        gate=f"{prefix}.gate",
        expert=f"{prefix}.experts.{{}}",
        names={"gate": "w1", "up": "w3", "down": "w2"},
    )
    return decoder_layer(parts, layer=layer, feed_forward=experts)
