"""Llama's layers, by the names of their tensors."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer, decoder_layer


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    prefix = f"model.layers.{layer}.mlp"
    feed_forward = parts.feed_forward(
        gate=f"{prefix}.gate_proj.weight", up=f"{prefix}.up_proj.weight", down=f"{prefix}.down_proj.weight"
    )
    return decoder_layer(parts, layer=layer, feed_forward=feed_forward)
