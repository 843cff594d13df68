"""Llama's layers, by the names of their tensors."""

from worker.blocks.parts import Parts
from worker.models.decoder import DecoderLayer


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the model."""
    prefix = f"model.layers.{layer}"
    return DecoderLayer(
        input_norm=parts.norm(f"{prefix}.input_layernorm.weight"),
        attention=parts.attention(f"{prefix}.self_attn", layer=layer),
        post_attention_norm=parts.norm(f"{prefix}.post_attention_layernorm.weight"),
        feed_forward=parts.feed_forward(
            gate=f"{prefix}.mlp.gate_proj.weight",
            up=f"{prefix}.mlp.up_proj.weight",
            down=f"{prefix}.mlp.down_proj.weight",
        ),
    )
