"""gpt-oss's layers: biases in attention, in the gate and in experts, whose gate and up rows lie in turn."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer, decoder_layer, feed_forward_norm


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    prefix = f"model.layers.{layer}.mlp"
    norm = feed_forward_norm(parts, layer=layer)
    experts = parts.paired_experts(layer=layer, norm=norm, gate=f"{prefix}.router", prefix=f"{prefix}.experts")
    return decoder_layer(parts, layer=layer, feed_forward=experts, qkv_bias=True, o_bias=True)
