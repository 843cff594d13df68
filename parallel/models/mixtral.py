"""Mixtral: Llama's attention with a mixture of experts in every layer (arXiv 2401.04088)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parallel.models import decoder, llama
from parallel.models.description import ExpertSpec, ModelDescription, Part, Split, TensorSpec


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `mixtral`."""
    decoder.require(config, "sliding_window", None)
    base = llama.describe(config)
    experts = ExpertSpec(
        num_experts=decoder.positive(config, "num_local_experts", default=8),
        top_k=decoder.positive(config, "num_experts_per_tok", default=2),
        intermediate_size=decoder.positive(config, "intermediate_size"),
    )
    if experts.top_k > experts.num_experts:
        raise ValueError(
            f"config.json has num_experts_per_tok = {experts.top_k}, "
            f"more than num_local_experts = {experts.num_experts}"
        )
    tensors = tuple(_tensors(config, experts=experts, num_layers=base.num_layers))
    return replace(base, family="mixtral", intermediate_size=None, experts=experts, tensors=tensors)


def _tensors(config: dict[str, Any], *, experts: ExpertSpec, num_layers: int) -> Iterator[TensorSpec]:
    hidden = decoder.positive(config, "hidden_size")
    yield from decoder.outer_tensors(config)
    for layer in range(num_layers):
        yield from decoder.attention_tensors(config, layer=layer)
        prefix = f"model.layers.{layer}.block_sparse_moe"
        yield TensorSpec(
            name=f"{prefix}.gate.weight", shape=(experts.num_experts, hidden), part=Part.LAYER, layer=layer
        )
        for expert in range(experts.num_experts):
            yield from decoder.feed_forward_tensors(
                ("w1", "w3", "w2"),
                prefix=f"{prefix}.experts.{expert}",
                hidden=hidden,
                width=experts.intermediate_size,
                layer=layer,
                split=Split.EXPERT_INTERMEDIATE,
                expert=expert,
            )
