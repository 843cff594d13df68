"""Qwen3-MoE: Qwen3's attention; layers of experts, with dense ones where the config says so (arXiv 2505.09388)."""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import Config, positive, require
from parallel.models.decoder import (
    attention_tensors,
    dense_tensors,
    describe_decoder,
    layer_count,
    require_full_attention,
)
from parallel.models.description import ExpertSpec, ModelDescription, TensorSpec
from parallel.models.experts import expert_tensors, softmax_gate


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `qwen3_moe`."""
    require_full_attention(config)
    require(config, "attention_bias", False)
    require(config, "norm_topk_prob", True, False)
    layers = _expert_layers(config)
    experts = ExpertSpec(
        gate=softmax_gate(config, renormalise=bool(config.get("norm_topk_prob", False))),
        intermediate_size=positive(config, "moe_intermediate_size"),
        layers=layers,
    )

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer, qk_norm=True)
        if layer in layers:
            prefix, names = f"model.layers.{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
            yield from expert_tensors(config, prefix=prefix, names=names, experts=experts, layer=layer)
        else:
            yield from dense_tensors(config, layer=layer)

    has_dense = len(layers) < layer_count(config)
    return describe_decoder(
        config,
        family="qwen3_moe",
        layer_tensors=layer_tensors,
        intermediate_size=positive(config, "intermediate_size") if has_dense else None,
        experts=experts if layers else None,
    )


def _expert_layers(config: Config) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer, counted from one, but for `mlp_only_layers`, counted from zero."""
    step = positive(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ValueError(f"config.json has mlp_only_layers = {dense!r}: it must be a list of layer numbers")
    layers = range(step - 1, layer_count(config), step)
    return tuple(layer for layer in layers if layer not in dense)
