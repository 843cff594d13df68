"""Which hosts of a topology are one machine: their launchers know nothing of each other, but ranks share its cores."""

from collections import Counter
from collections.abc import Mapping

from parallel.process.address import parse_address
from parallel.topology import HostSpec, Topology
from router.config import LOCAL


def ranks_of_machines(topology: Topology) -> Mapping[str, int]:
    """For each host, by name, the ranks that `topology` places on its machine."""
    machines = {host.name: _machine(host) for host in topology.hosts}
    counts = Counter(machines[place.host] for replica in topology.replicas for place in replica.placements)
    return {name: counts[machine] for name, machine in machines.items()}


def _machine(host: HostSpec) -> str:
    """By its address; every loopback address is this machine."""
    if host.address == LOCAL:
        return LOCAL
    address = parse_address(host.address)
    return LOCAL if address.is_loopback else address.host
