"""Mixtral: Llama's attention with a mixture of experts in every layer (arXiv 2401.04088)."""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import positive, require
from parallel.models.decoder import attention_tensors, describe_decoder, layer_count
from parallel.models.description import ExpertSpec, ModelDescription, TensorSpec
from parallel.models.experts import expert_tensors, softmax_gate

#: What a config may leave out.
_DEFAULTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5}


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `mixtral`."""
    config = {**_DEFAULTS, **config}
    require(config, "sliding_window", None)
    require(config, "attention_bias", False)
    experts = ExpertSpec(
        gate=softmax_gate(config, renormalise=True),
        intermediate_size=positive(config, "intermediate_size"),
        layers=tuple(range(layer_count(config))),
    )

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer)
        prefix = f"model.layers.{layer}.block_sparse_moe"
        yield from expert_tensors(config, prefix=prefix, names=("w1", "w3", "w2"), experts=experts, layer=layer)

    return describe_decoder(
        config, family="mixtral", layer_tensors=layer_tensors, intermediate_size=None, experts=experts
    )
