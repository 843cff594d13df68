"""GLM-4.5's layers: dense ones first, then experts beside one that every row takes."""

from worker.blocks.parts import Parts
from worker.models.decoder import (
    Block,
    DecoderLayer,
    Sum,
    decoder_layer,
    dense_block,
    feed_forward_block,
    feed_forward_norm,
)


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    attention = f"model.layers.{layer}.self_attn"
    has_experts = parts.description.has_experts(layer=layer)
    return decoder_layer(
        parts,
        layer=layer,
        feed_forward=_experts(parts, layer=layer) if has_experts else dense_block(parts, layer=layer),
        qkv_bias=parts.has(f"{attention}.q_proj.bias"),
        qk_norm=parts.has(f"{attention}.q_norm.weight"),
    )


def _experts(parts: Parts, *, layer: int) -> Block:
    prefix, norm = f"model.layers.{layer}.mlp", feed_forward_norm(parts, layer=layer)
    chosen = parts.experts(
        layer=layer,
        norm=norm,
        gate=f"{prefix}.gate",
        expert=f"{prefix}.experts.{{}}",
        names={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    )
    return Sum(chosen, feed_forward_block(parts, prefix=f"{prefix}.shared_experts", norm=norm))
