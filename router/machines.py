"""Which hosts of a topology are one machine: their launchers know nothing of each other, but ranks share its cores."""

from parallel.address import parse_address
from parallel.topology import HostSpec, Topology
from router.config import LOCAL


def ranks_of_machine(topology: Topology, host: HostSpec) -> int:
    """The ranks that `topology` places on the machine of `host`."""
    names = {other.name for other in topology.hosts if _machine(other) == _machine(host)}
    return sum(len(replica.ranks_on(name)) for replica in topology.replicas for name in names)


def _machine(host: HostSpec) -> str:
    """By its address; every loopback address is this machine."""
    if host.address == LOCAL:
        return LOCAL
    address = parse_address(host.address)
    return LOCAL if address.is_loopback else address.host
