"""The global topology: which rank of which replica runs on which device of which host. Pure: specs in, plan out."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from parallel.group_memory import MAX_RANKS, may_share
from parallel.placement import Demand, plan_runs
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape

POOL_NAMES = ("prefill", "decode", "unified")
#: More hosts than these are not listed one by one in a sentence.
_MOST_NAMES = 8


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """A host: `address` is `local` (the router starts its launcher) or host:port; `devices` are indices of `device`."""

    name: str
    address: str
    device: str
    devices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """One pool. `hosts` names those it may use, in the order in which it fills them; empty means any, by placement.

    `num_threads` is for each rank, None shares the cores.
    """

    name: str
    replicas: int
    shape: ReplicaShape
    engine: EngineSettings
    hosts: tuple[str, ...] = ()
    num_threads: int | None = None

    @property
    def num_ranks(self) -> int:
        """Devices that it takes."""
        return self.replicas * self.shape.world_size


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one rank runs."""

    host: str
    device: int


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """One replica of a pool; `placements` holds a place for each global rank, `num_threads` is as in PoolSpec."""

    pool: str
    index: int
    shape: ReplicaShape
    engine: EngineSettings
    placements: tuple[Placement, ...]
    num_threads: int | None = None

    @property
    def name(self) -> str:
        """`pool/index`: unique in a topology, the replica's name in logs and messages."""
        return f"{self.pool}/{self.index}"

    def ranks_on(self, host: str) -> tuple[int, ...]:
        """The global ranks of this replica that run on `host`."""
        return tuple(rank for rank, place in enumerate(self.placements) if place.host == host)

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """The hosts of this replica, ordered by their first rank: the first holds the leader."""
        return tuple(dict.fromkeys(place.host for place in self.placements))


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The whole plan. `digest` identifies it whatever the order of keys in the file that it came from."""

    model: str
    hosts: tuple[HostSpec, ...]
    replicas: tuple[ReplicaPlan, ...]

    def host(self, name: str) -> HostSpec:
        """The host named `name`."""
        return self._hosts_by_name[name]

    def pool(self, name: str) -> tuple[ReplicaPlan, ...]:
        """The replicas of pool `name`, none where the topology has no such pool."""
        return tuple(replica for replica in self.replicas if replica.pool == name)

    @cached_property
    def _hosts_by_name(self) -> dict[str, HostSpec]:
        return {host.name: host for host in self.hosts}

    @cached_property
    def digest(self) -> str:
        """A hash of hosts, pools and placements."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def plan_topology(*, model: str, hosts: Sequence[HostSpec], pools: Sequence[PoolSpec]) -> Topology:
    """Places every rank: first the pools that name hosts, which they fill in their order, then all others.

    What the others may share is placement.py's choice. Raises ValueError with both counts where a pool needs more
    devices than its hosts have left.
    """
    free, places = _fill_named(hosts=hosts, pools=pools)
    places |= _place_anywhere([pool for pool in pools if not pool.hosts], free=free)
    by_name = {host.name: host for host in hosts}
    replicas = (_replicas(pool, places=places[pool.name], hosts=by_name) for pool in pools)
    return Topology(model=model, hosts=tuple(hosts), replicas=tuple(chain.from_iterable(replicas)))


def check_devices(*, hosts: Sequence[HostSpec], pools: Sequence[PoolSpec]) -> None:
    """Raises the ValueError that `plan_topology` would raise, without placing what any host may hold."""
    free, _ = _fill_named(hosts=hosts, pools=pools)
    _check_rest([pool for pool in pools if not pool.hosts], free=free)


_Places = dict[str, list[Placement]]


def _fill_named(*, hosts: Sequence[HostSpec], pools: Sequence[PoolSpec]) -> tuple[dict[str, list[int]], _Places]:
    """What is free by host after the pools that name hosts, and the places of those pools."""
    free = {host.name: list(host.devices) for host in hosts}
    places: _Places = {}
    for pool in pools:
        if pool.hosts:
            # A host that a pool names twice still has each device once.
            names = tuple(dict.fromkeys(pool.hosts))
            _check_room(pool, names=names, left=sum(len(free[name]) for name in names))
            places[pool.name] = _fill(pool, free=free, names=names)
    return free, places


def _check_room(pool: PoolSpec, *, names: Sequence[str], left: int) -> None:
    if left < pool.num_ranks:
        shape = pool.shape
        raise ValueError(
            f"pool {pool.name} needs {pool.num_ranks} devices (replicas {pool.replicas} x pp {shape.pp} x stage "
            f"{shape.stage_size}), but its hosts {_few(names)} have {left} left: add devices or hosts, "
            "or make the pool smaller"
        )


def _fill(pool: PoolSpec, *, free: Mapping[str, list[int]], names: Sequence[str]) -> list[Placement]:
    places: list[Placement] = []
    for name in names:
        places += _take(free[name], host=name, count=min(len(free[name]), pool.num_ranks - len(places)))
    return places


def _check_rest(pools: Sequence[PoolSpec], *, free: Mapping[str, list[int]]) -> None:
    left = sum(map(len, free.values()))
    for pool in pools:
        _check_room(pool, names=tuple(free), left=left)
        left -= pool.num_ranks


def _place_anywhere(pools: Sequence[PoolSpec], *, free: Mapping[str, list[int]]) -> _Places:
    _check_rest(pools, free=free)
    names = tuple(free)
    room = [len(free[name]) for name in names]
    plans = plan_runs([Demand(replicas=pool.replicas, shape=pool.shape) for pool in pools], free=room)
    return {
        pool.name: [
            place for run in runs for place in _take(free[names[run.host]], host=names[run.host], count=run.count)
        ]
        for pool, runs in zip(pools, plans, strict=True)
    }


def _take(devices: list[int], *, host: str, count: int) -> list[Placement]:
    """The first `count` of a host's free `devices`, which are removed."""
    taken = [Placement(host=host, device=device) for device in devices[:count]]
    del devices[:count]
    return taken


def _replicas(pool: PoolSpec, *, places: Sequence[Placement], hosts: Mapping[str, HostSpec]) -> Iterator[ReplicaPlan]:
    world = pool.shape.world_size
    placements = [tuple(places[index * world : (index + 1) * world]) for index in range(pool.replicas)]
    shape = replace(
        pool.shape,
        draws_every_token=pool.name != "prefill",
        # The replicas of a pool are alike.
        shares_output=all(_shares_memory(own[-pool.shape.stage_size :], pool, hosts=hosts) for own in placements),
    )
    for index, own in enumerate(placements):
        yield ReplicaPlan(
            pool=pool.name,
            index=index,
            shape=shape,
            engine=pool.engine,
            placements=own,
            num_threads=pool.num_threads,
        )


def _shares_memory(stage: Sequence[Placement], pool: PoolSpec, *, hosts: Mapping[str, HostSpec]) -> bool:
    """Whether the ranks of a stage all meet in the memory of one host."""
    names = {place.host for place in stage}
    fits = len(names) == 1 and len(stage) <= MAX_RANKS
    return fits and may_share(device=hosts[names.pop()].device, kernels=pool.engine.kernels)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{names[0]} .. {names[-1]} ({len(names)})"
