"""Qwen3's layers: Llama's with a norm over each head of q and k."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer, decoder_layer, dense_block


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    return decoder_layer(parts, layer=layer, feed_forward=dense_block(parts, layer=layer), qk_norm=True)
