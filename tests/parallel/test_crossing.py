"""Groups across hosts, found and counted by kind."""

from parallel.crossing import find_crossings
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology

SHAPE = ReplicaShape(pp=2, attention=AttentionSizes(cp=2, tp=2), experts=ExpertSizes(ep=2, moe_dp=2))


def plan(*devices: int, replicas: int = 1, named: bool = False) -> Topology:
    hosts = [
        HostSpec(name=f"h{index}", address=f"h{index}:1", device="cpu", devices=tuple(range(count)))
        for index, count in enumerate(devices)
    ]
    names = tuple(host.name for host in hosts) if named else ()
    pool = PoolSpec(name="unified", replicas=replicas, shape=SHAPE, engine=EngineSettings(), hosts=names)
    return plan_topology(model="m", hosts=hosts, pools=[pool])


def kinds(topology: Topology) -> dict[str, tuple[int, int]]:
    return {found.axis: (found.num_crossing, found.num_groups) for found in find_crossings(topology)}


def test_a_replica_inside_a_host_crosses_nothing() -> None:
    assert kinds(plan(8, 8, replicas=2)) == {}


def test_stages_cross_first_then_cp_and_tp_last() -> None:
    assert kinds(plan(4, 4)) == {"pp": (4, 4)}
    assert kinds(plan(4, 2, 2)) == {"pp": (4, 4), "attn_cp": (2, 4)}
    assert kinds(plan(*[1] * 8)) == {"pp": (4, 4), "attn_cp": (4, 4), "attn_tp": (4, 4), "block": (4, 4)}


def test_replicas_that_do_not_cross_count_among_the_groups() -> None:
    assert kinds(plan(8, 4, 4, replicas=2)) == {"pp": (4, 8)}


def test_hosts_that_a_pool_names_are_filled_in_order_and_the_first_group_apart_is_told() -> None:
    crossings = {found.axis: found for found in find_crossings(plan(3, 8, named=True))}
    assert crossings["attn_tp"].num_crossing == 1
    first = crossings["attn_tp"]
    assert (first.pool, first.replica, first.ranks, first.hosts) == ("unified", "unified/0", (2, 3), ("h0", "h1"))
