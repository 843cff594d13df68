"""GLM-4.5 and its kin: experts behind a sigmoid gate, and one that every row takes (arXiv 2508.06471).

Its first layers are dense, part of each head is rotated; biases and norms of q and k are as the config says.
"""

from collections.abc import Iterator
from typing import Any

from parallel.models.config_values import Config, count, number, positive, require
from parallel.models.decoder import attention_tensors, dense_tensors, describe_decoder, layer_attention, layer_count
from parallel.models.description import ExpertSpec, ModelDescription, TensorSpec
from parallel.models.experts import expert_counts, expert_tensors, shared_tensors
from parallel.models.gates import GateSpec, Scoring

#: What a config may leave out.
_DEFAULTS = {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1, "norm_topk_prob": True}
_NAMES = ("gate_proj", "up_proj", "down_proj")


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `glm4_moe`."""
    config = {**_DEFAULTS, **config}
    for key in ("attention_bias", "use_qk_norm", "norm_topk_prob"):
        require(config, key, True, False)
    num_layers = layer_count(config)
    num_dense = min(count(config, "first_k_dense_replace"), num_layers)
    width = positive(config, "moe_intermediate_size")
    experts = ExpertSpec(
        gate=_gate(config),
        intermediate_size=width,
        layers=tuple(range(num_dense, num_layers)),
        shared_width=width * positive(config, "n_shared_experts", default=1),
    )

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(
            config,
            layer=layer,
            qkv_bias=config.get("attention_bias", False),
            qk_norm=config.get("use_qk_norm", False),
        )
        if layer < num_dense:
            yield from dense_tensors(config, layer=layer)
        else:
            prefix = f"model.layers.{layer}.mlp"
            yield from expert_tensors(config, prefix=prefix, names=_NAMES, experts=experts, layer=layer)
            yield from shared_tensors(config, prefix=f"{prefix}.shared_experts", experts=experts, layer=layer)

    return describe_decoder(
        config,
        family="glm4_moe",
        layer_tensors=layer_tensors,
        intermediate_size=positive(config, "intermediate_size") if num_dense else None,
        experts=experts if experts.layers else None,
        attention=(layer_attention(config, may_be_partial_rope=True),) * num_layers,
    )


def _gate(config: Config) -> GateSpec:
    num_experts, top_k = expert_counts(config)
    num_groups = positive(config, "n_group", default=1)
    kept_groups = positive(config, "topk_group", default=1, most=num_groups)
    if num_experts % num_groups or num_experts < 2 * num_groups:
        raise ValueError(
            f"config.json has n_group = {num_groups}: {num_experts} experts are no equal groups of two or more"
        )
    if top_k > kept_groups * (num_experts // num_groups):
        raise ValueError(
            f"config.json has num_experts_per_tok = {top_k}, more than topk_group = {kept_groups} groups of "
            f"{num_experts // num_groups} experts have"
        )
    return GateSpec(
        num_experts=num_experts,
        top_k=top_k,
        scoring=Scoring.SIGMOID,
        renormalise=config["norm_topk_prob"],
        scale=number(config, "routed_scaling_factor", least=0.0, default=1.0),
        has_correction=True,
        num_groups=num_groups,
        kept_groups=kept_groups,
    )
