"""Mixtral: Llama's attention with a mixture of experts in every layer (arXiv 2401.04088)."""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import positive, require
from parallel.models.decoder import attention_tensors, describe_decoder, expert_tensors
from parallel.models.description import ExpertSpec, ModelDescription, TensorSpec


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `mixtral`."""
    require(config, "sliding_window", None)
    require(config, "attention_bias", False)
    experts = ExpertSpec(
        num_experts=positive(config, "num_local_experts", default=8),
        top_k=positive(config, "num_experts_per_tok", default=2),
        intermediate_size=positive(config, "intermediate_size"),
    )
    if experts.top_k > experts.num_experts:
        raise ValueError(
            f"config.json has num_experts_per_tok = {experts.top_k}, "
            f"more than num_local_experts = {experts.num_experts}"
        )

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer)
        prefix = f"model.layers.{layer}.block_sparse_moe"
        yield from expert_tensors(config, prefix=prefix, names=("w1", "w3", "w2"), experts=experts, layer=layer)

    return describe_decoder(
        config,
        family="mixtral",
        layer_tensors=layer_tensors,
        intermediate_size=None,
        experts=experts,
        default_theta=1e6,
    )
