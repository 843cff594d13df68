"""Finds a family's layers. A new family is one line here."""

from collections.abc import Callable

from worker.blocks.parts import Parts
from worker.models import glm4_moe, gpt_oss, llama, mixtral, qwen2, qwen3, qwen3_moe
from worker.models.decoder import DecoderLayer

FAMILIES: dict[str, Callable[..., DecoderLayer]] = {
    "glm4_moe": glm4_moe.build_layer,
    "gpt_oss": gpt_oss.build_layer,
    "llama": llama.build_layer,
    "mixtral": mixtral.build_layer,
    "qwen2": qwen2.build_layer,
    "qwen3": qwen3.build_layer,
    "qwen3_moe": qwen3_moe.build_layer,
}


def build_layer(parts: Parts, *, layer: int) -> DecoderLayer:
    """Layer `layer` of the family that `parts` describes."""
    return FAMILIES[parts.description.family](parts, layer=layer)
