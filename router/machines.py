"""Which ranks share a machine's cores: hosts that are one machine, whose launchers know nothing of each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from parallel.cores import Machine, Node, RankCores, Team, check_threads, deal_cores
from parallel.process.address import parse_address
from parallel.process.cores import this_machine, threads_of
from parallel.topology import HostSpec, ReplicaPlan, Topology
from router.config import LOCAL

#: A replica's name and a global rank of it.
RankKey = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class DealtCores:
    """What the ranks of one pool on one host get of its machine: alike but for their nodes."""

    host: str
    machine: Machine
    pool: str
    cores: Mapping[RankKey, RankCores]

    @property
    def num_threads(self) -> int:
        """Of each rank."""
        return next(iter(self.cores.values())).num_threads


def plan_cores(topology: Topology, *, machines: Mapping[str, Machine]) -> tuple[DealtCores, ...]:
    """The cores of the ranks on those hosts whose machine is known, by host and pool.

    A launcher has its own view of a machine that it shares with others, by its affinity and quotas: its ranks get their
    part of that. ValueError where a pool asks for more threads than a machine has cores.
    """
    keys = _ranks_of_machines(topology)
    hosts = [topology.host(name) for name in machines]
    return tuple(part for host in hosts for part in _deal(topology, host, machines[host.name], keys[_machine(host)]))


def local_machines(topology: Topology, *, environment: Mapping[str, str]) -> Mapping[str, Machine]:
    """By host, what the launchers that this process would start, with `environment`, will say of this machine."""
    machine = this_machine(threads_per_rank=threads_of(environment))
    return {host.name: machine for host in topology.hosts if host.address == LOCAL}


def cores_by_rank(dealt: Sequence[DealtCores]) -> Mapping[RankKey, RankCores]:
    """Of every rank whose cores are known."""
    return {key: cores for part in dealt for key, cores in part.cores.items()}


def cores_of(cores: Mapping[RankKey, RankCores], replica: ReplicaPlan) -> Mapping[int, RankCores]:
    """Of the global ranks of one replica."""
    ranks = range(replica.shape.world_size)
    return {rank: cores[replica.name, rank] for rank in ranks if (replica.name, rank) in cores}


#: Of a machine, by pool, its ranks and their hosts.
_Ranks = Mapping[str, Mapping[RankKey, str]]


def _ranks_of_machines(topology: Topology) -> Mapping[str, _Ranks]:
    machines = {host.name: _machine(host) for host in topology.hosts}
    found: dict[str, dict[str, dict[RankKey, str]]] = {machine: {} for machine in machines.values()}
    for replica in topology.replicas:
        for rank, place in enumerate(replica.placements):
            found[machines[place.host]].setdefault(replica.pool, {})[replica.name, rank] = place.host
    return found


def _deal(topology: Topology, host: HostSpec, machine: Machine, ranks: _Ranks) -> Iterator[DealtCores]:
    asked = {pool: _asked(topology.pool(pool)[0], host=host, machine=machine) for pool in ranks}
    teams = [Team(num_ranks=len(keys), num_threads=asked[pool]) for pool, keys in ranks.items()]
    # A GPU has a node of its own, which is not known here.
    dealt = deal_cores(machine if host.device == "cpu" else _as_one_node(machine), teams)
    for (pool, keys), cores in zip(ranks.items(), dealt, strict=True):
        own = {key: part for (key, name), part in zip(keys.items(), cores, strict=True) if name == host.name}
        if own:
            yield DealtCores(host=host.name, machine=machine, pool=pool, cores=own)


def _asked(replica: ReplicaPlan, *, host: HostSpec, machine: Machine) -> int | None:
    """The threads of each rank that somebody asks for: who starts a launcher knows its machine, and is not checked."""
    if machine.threads_per_rank is not None or replica.num_threads is None:
        return machine.threads_per_rank
    try:
        check_threads(replica.num_threads, num_cores=machine.num_cores)
    except ValueError as error:
        raise ValueError(f"pools.{replica.pool} on host {host.name}: {error}") from None
    return replica.num_threads


def _as_one_node(machine: Machine) -> Machine:
    cores = tuple(core for node in machine.nodes for core in node.cores)
    return replace(machine, nodes=(Node(index=0, cores=cores),))


def _machine(host: HostSpec) -> str:
    """By its address; every loopback address is this machine."""
    if host.address == LOCAL:
        return LOCAL
    address = parse_address(host.address)
    return LOCAL if address.is_loopback else address.host
