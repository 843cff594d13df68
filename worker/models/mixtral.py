"""Mixtral's layers: Llama's attention, and experts in place of the feed-forward."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    prefix = f"model.layers.{layer}"
    return DecoderLayer(
        input_norm=parts.norm(f"{prefix}.input_layernorm.weight"),
        attention=parts.attention(f"{prefix}.self_attn", layer=layer),
        post_attention_norm=parts.norm(f"{prefix}.post_attention_layernorm.weight"),
        feed_forward=parts.experts(
            gate=f"{prefix}.block_sparse_moe.gate.weight",
            expert=f"{prefix}.block_sparse_moe.experts.{{}}",
            names={"gate": "w1", "up": "w3", "down": "w2"},
        ),
    )
