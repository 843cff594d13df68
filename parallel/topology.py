"""The global topology: which rank of which replica runs on which device of which host. Pure: specs in, plan out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape

POOL_NAMES = ("prefill", "decode", "unified")


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """A host: `address` is `local` (the router starts its launcher) or host:port; `devices` are indices of `device`."""

    name: str
    address: str
    device: str
    devices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """One pool. `hosts` names those it may use, in order; empty means all."""

    name: str
    replicas: int
    shape: ReplicaShape
    engine: EngineSettings
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one rank runs."""

    host: str
    device: int


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """One replica of a pool; `placements` holds a place for each global rank."""

    pool: str
    index: int
    shape: ReplicaShape
    engine: EngineSettings
    placements: tuple[Placement, ...]

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
        return next(host for host in self.hosts if host.name == name)

    def pool(self, name: str) -> tuple[ReplicaPlan, ...]:
        """The replicas of pool `name`, none where the topology has no such pool."""
        return tuple(replica for replica in self.replicas if replica.pool == name)

    @cached_property
    def digest(self) -> str:
        """A hash of hosts, pools and placements."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def plan_topology(*, model: str, hosts: Sequence[HostSpec], pools: Sequence[PoolSpec]) -> Topology:
    """Places every rank: pools in the order given, replicas and ranks in order, hosts filled in order.

    Raises ValueError with both counts where a pool needs more devices than its hosts have left.
    """
    free: dict[str, list[int]] = {host.name: list(host.devices) for host in hosts}
    replicas: list[ReplicaPlan] = []
    for pool in pools:
        # A host that a pool names twice still has each device once.
        names = tuple(dict.fromkeys(pool.hosts or free))
        places = _take(pool, free=free, names=names)
        world = pool.shape.world_size
        replicas += [
            ReplicaPlan(
                pool=pool.name,
                index=index,
                shape=pool.shape,
                engine=pool.engine,
                placements=tuple(places[index * world : (index + 1) * world]),
            )
            for index in range(pool.replicas)
        ]
    return Topology(model=model, hosts=tuple(hosts), replicas=tuple(replicas))


def _take(pool: PoolSpec, *, free: Mapping[str, list[int]], names: Sequence[str]) -> list[Placement]:
    needed = pool.replicas * pool.shape.world_size
    found = [Placement(host=name, device=device) for name in names for device in free[name]]
    if len(found) < needed:
        shape = pool.shape
        raise ValueError(
            f"pool {pool.name} needs {needed} devices (replicas {pool.replicas} x pp {shape.pp} x stage "
            f"{shape.stage_size}), but its hosts {', '.join(names)} have {len(found)} left: add devices or hosts, "
            "or make the pool smaller"
        )
    for place in found[:needed]:
        free[place.host].remove(place.device)
    return found[:needed]
