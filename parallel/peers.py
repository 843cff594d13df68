"""Who a rank hands KV to, or gets it from: by layers and heads, over every dp and cp rank of the other side."""

from dataclasses import dataclass

from parallel.handoff import Lane, plan_lanes
from parallel.models.description import ModelDescription
from parallel.shape import RankCoordinates, ReplicaShape


@dataclass(frozen=True, kw_only=True)
class Peers:
    """`ranks` of a replica of the other pool, with which `layers` of a cache group are exchanged: of what is stored per
    head the KV `heads`, [first, end) of the model's. Which of them it is, is the sequence's choice: its dp coordinate,
    and the cp ranks of its pages.
    """

    group: str
    layers: tuple[int, ...]
    heads: tuple[int, int] | None
    ranks: tuple[int, ...]


def target_peers(
    coordinates: RankCoordinates, *, description: ModelDescription, source: ReplicaShape, target: ReplicaShape
) -> tuple[Peers, ...]:
    """Where the prefill rank at `coordinates` writes; nothing where a lower tp rank holds the same heads."""
    own = (coordinates.pp_rank, coordinates.attn_tp_rank)
    return tuple(
        _peers(lane, ranks=_ranks_at(target, pp_rank=lane.target_pp, tp=lane.target_tp))
        for lane in plan_lanes(description, source=source, target=target)
        if (lane.source_pp, lane.source_tp) == own
    )


def source_peers(
    coordinates: RankCoordinates, *, description: ModelDescription, source: ReplicaShape, target: ReplicaShape
) -> tuple[Peers, ...]:
    """Who writes into the decode rank at `coordinates`."""
    own = (coordinates.pp_rank, coordinates.attn_tp_rank)
    return tuple(
        _peers(lane, ranks=_ranks_at(source, pp_rank=lane.source_pp, tp=lane.source_tp))
        for lane in plan_lanes(description, source=source, target=target)
        if (lane.target_pp, lane.target_tp) == own
    )


def _peers(lane: Lane, *, ranks: tuple[int, ...]) -> Peers:
    return Peers(group=lane.group, layers=lane.layers, heads=lane.heads, ranks=ranks)


def _ranks_at(shape: ReplicaShape, *, pp_rank: int, tp: int) -> tuple[int, ...]:
    """The global ranks with these coordinates, of every dp and cp."""
    return tuple(
        shape.attention_rank(pp_rank=pp_rank, dp=dp, cp=cp, tp=tp)
        for dp in range(shape.attention.dp)
        for cp in range(shape.attention.cp)
    )
