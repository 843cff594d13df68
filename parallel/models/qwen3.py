"""Qwen3: Llama with a norm over each head of q and k; the head size is the config's own (arXiv 2505.09388)."""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import positive, require
from parallel.models.decoder import attention_tensors, dense_tensors, describe_decoder, require_full_attention
from parallel.models.description import ModelDescription, TensorSpec

#: What a config may leave out.
_DEFAULTS = {"head_dim": 128}


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `qwen3`."""
    config = {**_DEFAULTS, **config}
    require_full_attention(config)
    require(config, "attention_bias", False)

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer, qk_norm=True)
        yield from dense_tensors(config, layer=layer)

    return describe_decoder(
        config,
        family="qwen3",
        layer_tensors=layer_tensors,
        intermediate_size=positive(config, "intermediate_size"),
    )
