"""The plan as plain rows: who runs where with which coordinates, every group, and the bytes that each rank will hold.

`router check` prints it (plan_table.py) and GetTopology sends it. Nothing here loads weights: bytes are counted from
the model's description.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import Group, RankCoordinates, ReplicaShape
from parallel.sharding import kv_elements_per_token, rank_slices
from parallel.topology import ReplicaPlan, Topology


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One rank. The expert coordinates are None for a dense model; `device` is `cpu:0`, `cuda:3`."""

    pool: str
    replica: int
    host: str
    device: str
    global_rank: int
    pp_rank: int
    attn_dp_rank: int
    attn_cp_rank: int
    attn_tp_rank: int
    moe_dp_rank: int | None
    moe_ep_rank: int | None
    moe_tp_rank: int | None
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One group: the global ranks of a replica that differ along `axis` only, ascending. A size of 1 is listed too."""

    pool: str
    replica: int
    axis: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PoolRow:
    """The totals of one pool. `sequence_tokens` is the longest sequence that its KV memory holds."""

    pool: str
    replicas: int
    ranks_per_replica: int
    dtype: str
    page_size: int
    sequence_tokens: int
    context_tokens_per_replica: int
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Rows in the order of pools, replicas and global ranks; groups in the order in which they are created."""

    model: str
    digest: str
    ranks: tuple[RankRow, ...]
    groups: tuple[GroupRow, ...]
    pools: tuple[PoolRow, ...]


def plan_report(topology: Topology, *, description: ModelDescription) -> PlanReport:
    """The rows of `topology`, whose model is `description`."""
    byte_counts = _ByteCounts(description=description)
    ranks = tuple(
        row for replica in topology.replicas for row in _rank_rows(replica, topology=topology, byte_counts=byte_counts)
    )
    names = dict.fromkeys(replica.pool for replica in topology.replicas)
    return PlanReport(
        model=topology.model,
        digest=topology.digest,
        ranks=ranks,
        groups=tuple(row for name in names for row in _group_rows(topology.pool(name))),
        pools=tuple(_pool_row(topology.pool(name), ranks=ranks) for name in names),
    )


def _rank_rows(replica: ReplicaPlan, *, topology: Topology, byte_counts: "_ByteCounts") -> Iterator[RankRow]:
    kinds = {name: topology.host(name).device for name in replica.hosts}
    for global_rank, place in enumerate(replica.placements):
        coordinates = replica.shape.coordinates(global_rank)
        weight_bytes, kv_bytes = byte_counts.of(coordinates, shape=replica.shape, engine=replica.engine)
        yield RankRow(
            pool=replica.pool,
            replica=replica.index,
            host=place.host,
            device=f"{kinds[place.host]}:{place.device}",
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            **vars(coordinates),
        )


def _group_rows(replicas: tuple[ReplicaPlan, ...]) -> Iterator[GroupRow]:
    """The groups of a pool's replicas, worked out once: they have one shape."""
    shape = replicas[0].shape
    groups: list[Group] = [group for axis in shape.axes for group in shape.groups(axis)]
    for replica in replicas:
        for group in groups:
            yield GroupRow(pool=replica.pool, replica=replica.index, axis=group.axis, ranks=group.ranks)


def _pool_row(replicas: tuple[ReplicaPlan, ...], *, ranks: tuple[RankRow, ...]) -> PoolRow:
    first = replicas[0]
    sequence_tokens = first.engine.kv_tokens * first.shape.attention.cp
    own = [row for row in ranks if row.pool == first.pool]
    return PoolRow(
        pool=first.pool,
        replicas=len(replicas),
        ranks_per_replica=first.shape.world_size,
        dtype=first.engine.dtype,
        page_size=first.engine.page_size,
        sequence_tokens=sequence_tokens,
        context_tokens_per_replica=sequence_tokens * first.shape.attention.dp,
        weight_bytes=sum(row.weight_bytes for row in own),
        kv_bytes=sum(row.kv_bytes for row in own),
    )


@dataclass(kw_only=True)
class _ByteCounts:
    """Bytes of weights and KV. Ranks that differ in dp, cp and moe_dp only hold equal slices, counted once."""

    description: ModelDescription
    counted: dict[object, tuple[int, int]] = field(default_factory=dict)

    def of(self, coordinates: RankCoordinates, *, shape: ReplicaShape, engine: EngineSettings) -> tuple[int, int]:
        place = (coordinates.pp_rank, coordinates.attn_tp_rank, coordinates.moe_ep_rank, coordinates.moe_tp_rank)
        key = (shape, engine, place)
        if key not in self.counted:
            self.counted[key] = self._count(coordinates, shape=shape, engine=engine)
        return self.counted[key]

    def _count(self, coordinates: RankCoordinates, *, shape: ReplicaShape, engine: EngineSettings) -> tuple[int, int]:
        slices = rank_slices(self.description, shape=shape, coordinates=coordinates)
        per_token = kv_elements_per_token(self.description, shape=shape, coordinates=coordinates)
        weight_bytes = engine.dtype_bytes * sum(part.num_elements for part in slices)
        return weight_bytes, engine.dtype_bytes * engine.kv_tokens * sum(per_token.values())
