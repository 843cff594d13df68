"""The parts of a description that layers of experts have in common."""

from collections.abc import Iterator
from dataclasses import replace

from parallel.models.config_values import Config, positive
from parallel.models.decoder import feed_forward_tensors
from parallel.models.description import ExpertSpec, Part, Split, TensorSpec
from parallel.models.file_tensors import ExpertStack, StackForm
from parallel.models.gates import GateSpec, Scoring

#: Each is described by itself, so a number that is a mistake must end before it is counted out.
_MAX_EXPERTS = 10_000


def softmax_gate(config: Config, *, renormalise: bool) -> GateSpec:
    """A gate that scores by softmax, and nothing else."""
    num_experts, top_k = expert_counts(config)
    return GateSpec(num_experts=num_experts, top_k=top_k, scoring=Scoring.SOFTMAX, renormalise=renormalise)


def expert_counts(config: Config) -> tuple[int, int]:
    """How many experts there are, and how many a row goes to.

    The first is `num_experts` or `n_routed_experts` on the hub, `num_local_experts` as transformers may save it.
    """
    keys = ("num_experts", "n_routed_experts", "num_local_experts")
    key = next((key for key in keys if key in config), keys[-1])
    num_experts, top_k = positive(config, key, most=_MAX_EXPERTS), positive(config, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(f"config.json has num_experts_per_tok = {top_k}, more than {key} = {num_experts}")
    return num_experts, top_k


def expert_tensors(
    config: Config, *, prefix: str, names: tuple[str, str, str], experts: ExpertSpec, layer: int
) -> Iterator[TensorSpec]:
    """The gate at `prefix`.gate and every expert's projections (`names`: gate, up, down) at `prefix`.experts.E."""
    hidden = positive(config, "hidden_size")
    yield from gate_tensors(experts.gate, prefix=f"{prefix}.gate", hidden=hidden, layer=layer)
    for expert in range(experts.num_experts):
        yield from feed_forward_tensors(
            names,
            prefix=f"{prefix}.experts.{expert}",
            hidden=hidden,
            width=experts.intermediate_size,
            layer=layer,
            split=Split.EXPERT_INTERMEDIATE,
            expert=expert,
        )


def paired_expert_tensors(
    *, prefix: str, experts: ExpertSpec, hidden: int, layer: int, form: StackForm
) -> Iterator[TensorSpec]:
    """Experts with biases whose gate and up projection are one tensor, their rows in turn, all experts' in one stack.

    Expert E's are `prefix`.E.gate_up_proj [2 · width, hidden] and down_proj [hidden, width], with _bias each.
    """
    width, pairs, columns = experts.intermediate_size, Split.EXPERT_PAIRS, Split.EXPERT_INTERMEDIATE
    for expert in range(experts.num_experts):
        for name, shape, split in (
            ("gate_up_proj", (2 * width, hidden), (0, pairs)),
            ("down_proj", (hidden, width), (1, columns)),
        ):
            is_sum = split[1] is columns
            weight = TensorSpec(
                name=f"{prefix}.{expert}.{name}",
                shape=shape,
                part=Part.LAYER,
                layer=layer,
                expert=expert,
                splits=(split,),
                stack=ExpertStack(name=f"{prefix}.{name}", num_experts=experts.num_experts, form=form),
            )
            yield weight
            yield replace(
                weight,
                name=f"{weight.name}_bias",
                shape=shape[:1],
                splits=() if is_sum else (split,),
                stack=ExpertStack(name=f"{prefix}.{name}_bias", num_experts=experts.num_experts, form=StackForm.AS_IS),
                added_over=columns if is_sum else None,
            )


def shared_tensors(config: Config, *, prefix: str, experts: ExpertSpec, layer: int) -> Iterator[TensorSpec]:
    """The feed-forward at `prefix` that every row takes, cut over attention's tp as a dense one is."""
    yield from feed_forward_tensors(
        ("gate_proj", "up_proj", "down_proj"),
        prefix=prefix,
        hidden=positive(config, "hidden_size"),
        width=experts.shared_width,
        layer=layer,
        split=Split.DENSE_INTERMEDIATE,
    )


def gate_tensors(gate: GateSpec, *, prefix: str, hidden: int, layer: int) -> Iterator[TensorSpec]:
    """The gate's weight at `prefix`, and the biases that it has."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (gate.num_experts, hidden)}
    if gate.has_bias:
        shapes["bias"] = (gate.num_experts,)
    if gate.has_correction:
        shapes["e_score_correction_bias"] = (gate.num_experts,)
    for name, shape in shapes.items():
        yield TensorSpec(name=f"{prefix}.{name}", shape=shape, part=Part.LAYER, layer=layer, in_float32=True)
