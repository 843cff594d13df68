"""The plan as plain rows: who runs where with which coordinates, every group, and the bytes that each rank will hold.

`router check` prints it (plan_table.py) and GetTopology sends it. Nothing here loads weights: bytes are counted from
the model's description.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from parallel.admission import longest_sequence
from parallel.crossing import Crossing, find_crossings
from parallel.exchange_memory import exchange_bytes
from parallel.group_memory import local_groups, may_share, memory_shape
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import Group, RankCoordinates, ReplicaShape
from parallel.sharding import experts_of
from parallel.topology import ReplicaPlan, Topology
from parallel.traffic import busiest_traffic, handoff_bytes_per_token
from router.machines import DealtCores


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
    """The totals of one pool. `sequence_tokens` is the longest sequence that one of its replicas admits when empty.

    `exchange_bytes` is what the exchange over cp may hold on one rank besides the pages, `group_bytes`, on all hosts,
    the memory of groups whose ranks share it.
    """

    pool: str
    replicas: int
    ranks_per_replica: int
    dtype: str
    page_size: int
    sequence_tokens: int
    context_tokens_per_replica: int
    weight_bytes: int
    kv_bytes: int
    exchange_bytes: int
    group_bytes: int

    @property
    def context_tokens(self) -> int:
        """Tokens of KV that fit in the pool."""
        return self.replicas * self.context_tokens_per_replica


@dataclass(frozen=True, kw_only=True)
class StorageRow:
    """The KV memory of one cache group on a rank of `pool`, of the stage that has most of it: `layers` of it there,
    each of `pages` pages and a spare one, in all `num_bytes`; a token takes `token_bytes` over those layers.

    `window` is how many tokens back a query sees, 0 where it sees all.
    """

    pool: str
    group: str
    window: int
    layers: int
    pages: int
    tokens: int
    token_bytes: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrafficRow:
    """What a rank of `pool` sends along `axis` in a full step of `step_tokens`, of the stage that sends most.

    `cached_bytes` come on top for each 1000 cached tokens of its sequences.
    """

    pool: str
    axis: str
    group_size: int
    step_tokens: int
    sent_bytes: int
    cached_bytes: int
    what: str


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Rows in the order of pools, replicas and global ranks.

    `handoff_bytes` are written for each prompt token, None without a hand-off. `crossings` are groups across hosts.
    `cores` are those of hosts whose machine is known.
    """

    topology: Topology
    ranks: tuple[RankRow, ...]
    pools: tuple[PoolRow, ...]
    storage: tuple[StorageRow, ...]
    traffic: tuple[TrafficRow, ...]
    crossings: tuple[Crossing, ...]
    handoff_bytes: int | None
    cores: tuple[DealtCores, ...] = ()

    @property
    def hosts_without_cores(self) -> tuple[str, ...]:
        """Hosts with ranks whose cores are not known."""
        known = {part.host for part in self.cores}
        return tuple(dict.fromkeys(row.host for row in self.ranks if row.host not in known))

    @cached_property
    def groups(self) -> tuple[GroupRow, ...]:
        """Every group, in the order in which they are created: worked out when asked for, as there may be millions."""
        return tuple(row for replicas in _by_pool(self.topology) for row in _group_rows(replicas))


def plan_report(topology: Topology, *, description: ModelDescription, cores: tuple[DealtCores, ...] = ()) -> PlanReport:
    """The rows of `topology`, whose model is `description`; `cores` as far as they are known."""
    pools = _by_pool(topology)
    ranks = tuple(row for replicas in pools for row in _rank_rows(replicas, topology=topology, description=description))
    return PlanReport(
        topology=topology,
        ranks=ranks,
        pools=tuple(_pool_row(replicas, ranks=ranks, topology=topology, description=description) for replicas in pools),
        storage=tuple(row for replicas in pools for row in _storage_rows(replicas[0], description=description)),
        traffic=tuple(row for replicas in pools for row in _traffic_rows(replicas[0], description=description)),
        crossings=find_crossings(topology),
        handoff_bytes=_handoff_bytes(topology, description=description),
        cores=cores,
    )


def _by_pool(topology: Topology) -> list[tuple[ReplicaPlan, ...]]:
    """The replicas of each pool, which are equal but for their places."""
    return [topology.pool(name) for name in dict.fromkeys(replica.pool for replica in topology.replicas)]


def _rank_rows(
    replicas: tuple[ReplicaPlan, ...], *, topology: Topology, description: ModelDescription
) -> Iterator[RankRow]:
    shape, engine = replicas[0].shape, replicas[0].engine
    every = [shape.coordinates(global_rank) for global_rank in range(shape.world_size)]
    held = _num_experts_held(shape, description=description)
    # Ranks of a stage that hold equally many experts hold equal bytes: all else is padded to one size.
    like = {(mine.pp_rank, held[mine.moe_ep_rank]): mine for mine in every}
    found = {key: _rank_bytes(mine, shape=shape, engine=engine, description=description) for key, mine in like.items()}
    for replica in replicas:
        for coordinates, place in zip(every, replica.placements, strict=True):
            weight_bytes, kv_bytes = found[coordinates.pp_rank, held[coordinates.moe_ep_rank]]
            yield RankRow(
                pool=replica.pool,
                replica=replica.index,
                host=place.host,
                device=f"{topology.host(place.host).device}:{place.device}",
                weight_bytes=weight_bytes,
                kv_bytes=kv_bytes,
                **vars(coordinates),
            )


def _num_experts_held(shape: ReplicaShape, *, description: ModelDescription) -> dict[int | None, int]:
    """Different experts by ep coordinate: one whose slots a placement fills twice with an expert loads it once."""
    if shape.experts is None:
        return {None: 0}
    # The file gives one placement for all layers.
    table = next(iter(experts_of(description, shape.experts).values()))
    return {ep_rank: len(set(table.held_by(ep_rank))) for ep_rank in range(shape.experts.ep)}


def _rank_bytes(
    coordinates: RankCoordinates, *, shape: ReplicaShape, engine: EngineSettings, description: ModelDescription
) -> tuple[int, int]:
    """Bytes of weights and KV of the rank at `coordinates`."""
    share = ModelShare(description=description, shape=shape, coordinates=coordinates)
    weight_bytes = sum(part.num_bytes(engine) for part in share.slices())
    return weight_bytes, share.storage(engine).num_bytes


def _storage_rows(replica: ReplicaPlan, *, description: ModelDescription) -> Iterator[StorageRow]:
    shape, settings = replica.shape, replica.engine
    ranks = [shape.coordinates(shape.attention_rank(pp_rank=pp_rank, dp=0)) for pp_rank in range(shape.pp)]
    shares = [ModelShare(description=description, shape=shape, coordinates=rank) for rank in ranks]
    for group in description.cache_groups:
        share = max(shares, key=lambda share: len(share.storage(settings).group(group.name).layers))
        region = share.storage(settings).group(group.name)
        pages = settings.pages_of(group, pp=shape.pp)
        yield StorageRow(
            pool=replica.pool,
            group=group.name,
            window=group.window,
            layers=len(region.layers),
            pages=pages,
            tokens=pages * settings.page_size,
            token_bytes=share.token_bytes(settings)[group.name],
            num_bytes=region.num_bytes,
        )


def _traffic_rows(replica: ReplicaPlan, *, description: ModelDescription) -> Iterator[TrafficRow]:
    shape, settings = replica.shape, replica.engine
    for traffic in busiest_traffic(description, shape=shape, settings=settings, pool=replica.pool):
        yield TrafficRow(
            pool=replica.pool,
            axis=traffic.axis,
            group_size=traffic.size,
            step_tokens=settings.step_tokens(replica.pool),
            sent_bytes=traffic.sent_bytes,
            cached_bytes=traffic.cached_bytes,
            what=traffic.what,
        )


def _handoff_bytes(topology: Topology, *, description: ModelDescription) -> int | None:
    prefill, decode = topology.pool("prefill"), topology.pool("decode")
    if not prefill or not decode:
        return None
    return handoff_bytes_per_token(
        description, source=prefill[0].shape, target=decode[0].shape, settings=prefill[0].engine
    )


def _group_rows(replicas: tuple[ReplicaPlan, ...]) -> Iterator[GroupRow]:
    """The groups of a pool's replicas, worked out once: they have one shape."""
    shape = replicas[0].shape
    groups: list[Group] = [group for axis in shape.axes for group in shape.groups(axis)]
    for replica in replicas:
        for group in groups:
            yield GroupRow(pool=replica.pool, replica=replica.index, axis=group.axis, ranks=group.ranks)


def _pool_row(
    replicas: tuple[ReplicaPlan, ...],
    *,
    ranks: tuple[RankRow, ...],
    topology: Topology,
    description: ModelDescription,
) -> PoolRow:
    first = replicas[0]
    attention = first.shape.attention
    own = [row for row in ranks if row.pool == first.pool]
    return PoolRow(
        pool=first.pool,
        replicas=len(replicas),
        ranks_per_replica=first.shape.world_size,
        dtype=first.engine.dtype,
        page_size=first.engine.page_size,
        sequence_tokens=longest_sequence(first.engine, cp=attention.cp, groups=description.cache_groups),
        context_tokens_per_replica=first.engine.kv_tokens * attention.cp * attention.dp,
        weight_bytes=sum(row.weight_bytes for row in own),
        kv_bytes=sum(row.kv_bytes for row in own),
        exchange_bytes=exchange_bytes(
            description,
            shape=first.shape,
            settings=first.engine,
            step_tokens=first.engine.step_tokens(first.pool),
        ),
        group_bytes=sum(_group_bytes(replica, topology=topology) for replica in replicas),
    )


def _group_bytes(replica: ReplicaPlan, *, topology: Topology) -> int:
    """Memory of the replica's groups, where its launchers have the native kernels that it takes."""
    kernels = replica.engine.kernels
    cpus = {host for host in replica.hosts if may_share(device=topology.host(host).device, kernels=kernels)}
    if not cpus:
        return 0
    groups = (group.ranks for axis in replica.shape.axes for group in replica.shape.groups(axis))
    hosts = {rank: place.host for rank, place in enumerate(replica.placements) if place.host in cpus}
    memories = Counter(memory_shape(ranks, shape=replica.shape) for ranks in local_groups(groups, hosts=hosts))
    return sum(count * memory.num_bytes for memory, count in memories.items())
