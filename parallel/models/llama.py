"""Llama: a dense decoder with grouped-query attention (arXiv 2302.13971, 2307.09288)."""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import positive, require
from parallel.models.decoder import attention_tensors, dense_tensors, describe_decoder
from parallel.models.description import ModelDescription, TensorSpec


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `llama`."""
    require(config, "attention_bias", False)
    require(config, "mlp_bias", False)

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer)
        yield from dense_tensors(config, layer=layer)

    return describe_decoder(
        config,
        family="llama",
        layer_tensors=layer_tensors,
        intermediate_size=positive(config, "intermediate_size"),
    )
