"""Qwen3-MoE's layers: Qwen3's attention, and experts or a dense feed-forward."""

from worker.blocks.parts import Parts
from worker.models.decoder import Block, DecoderLayer, decoder_layer, dense_block, feed_forward_norm


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    has_experts = parts.description.has_experts(layer=layer)
    feed_forward = _experts(parts, layer=layer) if has_experts else dense_block(parts, layer=layer)
    return decoder_layer(parts, layer=layer, feed_forward=feed_forward, qk_norm=True)


def _experts(parts: Parts, *, layer: int) -> Block:
    prefix = f"model.layers.{layer}.mlp"
    return parts.experts(
        layer=layer,
        norm=feed_forward_norm(parts, layer=layer),
        gate=f"{prefix}.gate",
        expert=f"{prefix}.experts.{{}}",
        names={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    )
