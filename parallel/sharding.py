"""How each dimension of a model is split over an axis: layers over pp, heads over tp, experts over ep. Pure.

What a rank holds of them all is in model_share.py. A dimension that is split unevenly is zero-padded at its end.
"""

from dataclasses import dataclass
from math import prod

from parallel.expert_table import ExpertTable, expert_table
from parallel.mesh import divisors
from parallel.models.description import ModelDescription
from parallel.partition import balanced_bounds
from parallel.shape import ExpertSizes, ReplicaShape


@dataclass(frozen=True, kw_only=True)
class Interval:
    """[start, end) of a dimension, and the size it is padded to."""

    start: int
    end: int
    padded: int

    @property
    def size(self) -> int:
        """Number of elements that exist."""
        return self.end - self.start


def check_heads(description: ModelDescription, *, tp: int) -> None:
    """ValueError with the legal sizes where tp does not fit the head counts."""
    for heads, kv_heads in description.head_counts:
        legal = [size for size in divisors(heads) if _kv_fits(kv_heads, tp=size)]
        if tp not in legal:
            raise ValueError(
                f"tp {tp} does not fit {heads} query heads and {kv_heads} KV heads: "
                f"tp may be {', '.join(map(str, legal))}"
            )


def even_interval(size: int, *, parts: int, index: int) -> Interval:
    """Part `index` of `size` elements padded to a multiple of `parts`."""
    padded = -(-size // parts)
    return Interval(start=min(index * padded, size), end=min((index + 1) * padded, size), padded=padded)


def kv_head_interval(num_kv_heads: int, *, tp: int, tp_rank: int) -> Interval:
    """The KV heads of a tp rank: its share, or one head that tp / num_kv_heads neighbouring ranks hold alike."""
    if tp <= num_kv_heads:
        return even_interval(num_kv_heads, parts=tp, index=tp_rank)
    head = tp_rank // (tp // num_kv_heads)
    return Interval(start=head, end=head + 1, padded=1)


def stage_layers(description: ModelDescription, *, shape: ReplicaShape, pp_rank: int) -> range:
    """The layers of a stage: contiguous, at least one each, the costliest stage as cheap as it can be.

    Costs are counted in weights that a token meets: a row of the embedding on the first stage, the output on the last,
    unless but few of a step's tokens are drawn from.
    """
    bounds = _stage_bounds(description, pp=shape.pp, draws_every_token=shape.draws_every_token)
    return range(bounds[pp_rank], bounds[pp_rank + 1])


def experts_of(description: ModelDescription, sizes: ExpertSizes) -> dict[int, ExpertTable]:
    """Which experts each ep coordinate holds, by layer; ValueError where a placement or ep does not fit the model.

    Layers that share a placement share a table. All have equally many slots, so that a dispatcher serves any of them.
    """
    assert description.experts is not None
    layers, placements = description.experts.layers, sizes.placements or ((),)
    if len(placements) not in (1, len(layers)):
        raise ValueError(f"placements are given for {len(placements)} layers: {len(layers)} layers have experts")
    tables = {
        slots: expert_table(num_experts=description.experts.num_experts, ep=sizes.ep, placement=slots)
        for slots in placements
    }
    if len({table.slots_per_rank for table in tables.values()}) > 1:
        counts = ", ".join(str(len(slots)) for slots in tables)
        raise ValueError(f"placements have {counts} slots: every layer needs equally many")
    return {layer: tables[placements[index % len(placements)]] for index, layer in enumerate(layers)}


def _kv_fits(num_kv_heads: int, *, tp: int) -> bool:
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def _stage_bounds(description: ModelDescription, *, pp: int, draws_every_token: bool) -> tuple[int, ...]:
    """Where each stage begins, and the end."""
    num_layers = description.num_layers
    if pp > num_layers:
        raise ValueError(f"pp {pp} exceeds the model's {num_layers} layers: each stage needs one layer or more")
    costs = [0] * num_layers
    for spec in description.tensors:
        if spec.layer is not None and spec.expert is None:
            costs[spec.layer] += prod(spec.shape)
        elif spec.layer is not None and description.experts is not None:
            # Of num_experts equal experts a token visits top_k.
            costs[spec.layer] += prod(spec.shape) * description.experts.top_k // description.experts.num_experts
    costs[0] += description.hidden_size  # of the embedding a token reads one row
    if draws_every_token:
        costs[-1] += description.vocab_size * description.hidden_size
    return balanced_bounds(costs, parts=pp)
