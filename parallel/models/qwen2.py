"""Qwen2 and Qwen2.5: Llama with biases on the projections of q, k and v (arXiv 2407.10671)."""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import positive
from parallel.models.decoder import attention_tensors, dense_tensors, describe_decoder, require_full_attention
from parallel.models.description import ModelDescription, TensorSpec


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `qwen2`."""
    require_full_attention(config)

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer, qkv_bias=True)
        yield from dense_tensors(config, layer=layer)

    return describe_decoder(
        config,
        family="qwen2",
        layer_tensors=layer_tensors,
        intermediate_size=positive(config, "intermediate_size"),
    )
