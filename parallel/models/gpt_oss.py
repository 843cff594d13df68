"""gpt-oss: windows in every other layer, sinks, biases everywhere, a clamped activation (arXiv 2508.10925).

It is published with its experts' weights as MXFP4; transformers saves them widened, each transposed. In both the rows
of gate and up lie in turn.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parallel.models.config_values import Config, number, positive, require
from parallel.models.decoder import attention_tensors, describe_decoder, layer_attention, layer_count, window_groups
from parallel.models.description import ExpertSpec, ModelDescription, Part, Split, TensorSpec
from parallel.models.experts import expert_counts, gate_tensors, paired_expert_tensors
from parallel.models.file_tensors import MXFP4_BLOCK, StackForm
from parallel.models.gates import Activation, GateSpec, Scoring
from parallel.models.quantisation import is_mxfp4

#: What a config may leave out.
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64, "sliding_window": 128}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_WINDOW, _FULL = "sliding_attention", "full_attention"


def describe(config: dict[str, Any]) -> ModelDescription:
    """The description of a checkpoint with model_type `gpt_oss`."""
    config = {**_DEFAULTS, **config}
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = _ROPE
    require(config, "attention_bias", True)
    windows = layer_windows(config)
    experts = _experts(config)
    form = StackForm.MXFP4 if is_mxfp4(config) else StackForm.TRANSPOSED

    def layer_tensors(layer: int) -> Iterator[TensorSpec]:
        yield from attention_tensors(config, layer=layer, qkv_bias=True, o_bias=True)
        yield _sinks(config, layer=layer)
        prefix = f"model.layers.{layer}.mlp"
        hidden = positive(config, "hidden_size")
        yield from gate_tensors(experts.gate, prefix=f"{prefix}.router", hidden=hidden, layer=layer)
        yield from paired_expert_tensors(
            prefix=f"{prefix}.experts", experts=experts, hidden=hidden, layer=layer, form=form
        )

    return describe_decoder(
        config,
        family="gpt_oss",
        layer_tensors=layer_tensors,
        intermediate_size=None,
        experts=experts,
        attention=(replace(layer_attention(config), has_sinks=True),) * len(windows),
        cache_groups=window_groups(config, windows),
    )


def layer_windows(config: Config) -> tuple[int | None, ...]:
    """For each layer how many positions a query sees, its own the last; None where it sees all before it."""
    num_layers = layer_count(config)
    kinds = config.get("layer_types") or [_FULL if layer % 2 else _WINDOW for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"config.json has layer_types = {kinds!r}: it must be a list of {num_layers} kinds")
    for layer, kind in enumerate(kinds):
        if kind not in (_WINDOW, _FULL):
            raise ValueError(f"config.json has layer_types[{layer}] = {kind!r}: only {_WINDOW!r}, {_FULL!r} runs yet")
    window = positive(config, "sliding_window") if _WINDOW in kinds else None
    return tuple(window if kind == _WINDOW else None for kind in kinds)


def _experts(config: Config) -> ExpertSpec:
    num_experts, top_k = expert_counts(config)
    width = positive(config, "intermediate_size")
    for key, size in (("intermediate_size", width), ("hidden_size", positive(config, "hidden_size"))):
        if is_mxfp4(config) and size % MXFP4_BLOCK:
            raise ValueError(f"config.json has {key} = {size}: MXFP4 has blocks of {MXFP4_BLOCK} inputs")
    return ExpertSpec(
        gate=GateSpec(num_experts=num_experts, top_k=top_k, scoring=Scoring.SOFTMAX, renormalise=True, has_bias=True),
        intermediate_size=width,
        layers=tuple(range(layer_count(config))),
        activation=Activation(
            alpha=number(config, "swiglu_alpha", least=0.0, default=1.702),
            up_offset=1.0,
            limit=number(config, "swiglu_limit", least=0.0, default=7.0),
        ),
    )


def _sinks(config: Config, *, layer: int) -> TensorSpec:
    """For each query head a logit without a value, which takes its share of the softmax (arXiv 2309.17453)."""
    return TensorSpec(
        name=f"model.layers.{layer}.self_attn.sinks",
        shape=(positive(config, "num_attention_heads"),),
        part=Part.LAYER,
        layer=layer,
        splits=((0, Split.QUERY_HEADS),),
        in_float32=True,
    )
