"""Qwen2's layers: Llama's with biases on q, k and v."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer, decoder_layer, dense_block


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    return decoder_layer(parts, layer=layer, feed_forward=dense_block(parts, layer=layer), qkv_bias=True)
