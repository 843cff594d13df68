"""The parts of a description that layers of experts have in common."""

from collections.abc import Iterable, Iterator

from parallel.models.config_values import Config, positive
from parallel.models.decoder import feed_forward_tensors
from parallel.models.description import ExpertSpec, Part, Split, TensorSpec

#: Each is described by itself, so a number that is a mistake must end before it is counted out.
_MAX_EXPERTS = 10_000


def expert_spec(config: Config, *, width_key: str, layers: Iterable[int], renormalise: bool) -> ExpertSpec:
    """The experts of `layers`. Their number is `num_experts` on the hub, `num_local_experts` as transformers saves."""
    count_key = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = ExpertSpec(
        num_experts=positive(config, count_key, most=_MAX_EXPERTS),
        top_k=positive(config, "num_experts_per_tok"),
        intermediate_size=positive(config, width_key),
        layers=tuple(layers),
        renormalise=renormalise,
    )
    if experts.top_k > experts.num_experts:
        raise ValueError(
            f"config.json has num_experts_per_tok = {experts.top_k}, more than {count_key} = {experts.num_experts}"
        )
    return experts


def expert_tensors(
    config: Config, *, prefix: str, names: tuple[str, str, str], experts: ExpertSpec, layer: int
) -> Iterator[TensorSpec]:
    """The gate at `prefix`.gate and every expert's projections (`names`: gate, up, down) at `prefix`.experts.E."""
    hidden = positive(config, "hidden_size")
    yield TensorSpec(name=f"{prefix}.gate.weight", shape=(experts.num_experts, hidden), part=Part.LAYER, layer=layer)
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
