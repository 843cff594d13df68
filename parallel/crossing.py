"""Which groups cross hosts, told by kind: one line for an axis of a pool, not one for each of its groups. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.shape import Group
from parallel.topology import ReplicaPlan, Topology

#: The axes along which a step moves bytes. Those of moe_ep and moe_tp move inside their block.
MOVING_AXES = ("pp", "attn_cp", "attn_tp", "block")


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """`num_crossing` of the `num_groups` groups of `axis` in `pool` have ranks on two hosts or more.

    The first of them is in replica `replica`: its global `ranks`, and `hosts` in the order of those.
    """

    pool: str
    axis: str
    num_groups: int
    num_crossing: int
    replica: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]


def find_crossings(topology: Topology) -> tuple[Crossing, ...]:
    """One for each axis of each pool that has a group across hosts, in the order of pools and of `MOVING_AXES`."""
    names = dict.fromkeys(replica.pool for replica in topology.replicas)
    return tuple(crossing for name in names for crossing in _of_pool(topology.pool(name)) if crossing.num_crossing)


def _of_pool(replicas: Sequence[ReplicaPlan]) -> Iterator[Crossing]:
    shape = replicas[0].shape
    spanning = [replica for replica in replicas if len(replica.hosts) > 1]
    for axis in MOVING_AXES:
        groups = list(shape.groups(axis)) if spanning and axis in shape.axes else []
        found = [(replica, group) for replica in spanning for group in groups if _is_apart(replica, group)]
        if found:
            replica, group = found[0]
            yield Crossing(
                pool=replica.pool,
                axis=axis,
                num_groups=len(groups) * len(replicas),
                num_crossing=len(found),
                replica=replica.name,
                ranks=group.ranks,
                hosts=tuple(dict.fromkeys(replica.placements[rank].host for rank in group.ranks)),
            )


def _is_apart(replica: ReplicaPlan, group: Group) -> bool:
    places = replica.placements
    host = places[group.ranks[0]].host
    return any(places[rank].host != host for rank in group.ranks)
