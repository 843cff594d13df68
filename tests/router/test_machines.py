"""Hosts that are one machine share its cores; only ranks count, not devices."""

from collections.abc import Mapping

import pytest

from parallel.cores import Machine, Node
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology
from router.machines import cores_by_rank, cores_of, local_machines, plan_cores


def machine(*sizes: int, threads_per_rank: int | None = None) -> Machine:
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    nodes = [tuple(range(first, first + size)) for first, size in zip(firsts, sizes, strict=True)]
    return Machine(
        nodes=tuple(Node(index=index, cores=cores) for index, cores in enumerate(nodes)),
        num_cores=sum(sizes),
        threads_per_rank=threads_per_rank,
    )


def topology(
    addresses: list[str], *, dp: int = 1, device: str = "cpu", threads: Mapping[str, int] | None = None
) -> Topology:
    """A pool on each host, the first two of them prefill and decode."""
    hosts = [
        HostSpec(name=str(index), address=address, device=device, devices=(0, 1, 2, 3))
        for index, address in enumerate(addresses)
    ]
    pools = [
        PoolSpec(
            name=name,
            replicas=1,
            shape=ReplicaShape(attention=AttentionSizes(dp=dp), experts=None),
            engine=EngineSettings(),
            hosts=(str(index),),
            num_threads=(threads or {}).get(name),
        )
        for index, name in enumerate(("prefill", "decode", "unified")[: len(addresses)])
    ]
    return plan_topology(model="", hosts=hosts, pools=pools)


def threads(plan: Topology, machines: Mapping[str, Machine]) -> dict[str, int]:
    return {part.host: part.num_threads for part in plan_cores(plan, machines=machines)}


@pytest.mark.parametrize(
    ("addresses", "shares"),
    [
        (["local", "local", "far:1"], [6, 6, 12]),
        (["local", "[::1]:1", "127.0.0.1:2"], [4, 4, 4]),
        (["far:1", "far:2", "near:1"], [6, 6, 12]),
    ],
)
def test_the_ranks_of_every_host_at_one_machine_count(addresses: list[str], shares: list[int]) -> None:
    found = threads(topology(addresses), {str(index): machine(12) for index in range(3)})
    assert list(found.values()) == shares


def test_launchers_of_one_machine_deal_out_different_nodes_of_it() -> None:
    plan = topology(["far:1", "far:2"], dp=2)
    dealt = plan_cores(plan, machines=dict.fromkeys(("0", "1"), machine(4, 4)))
    assert [(part.host, part.pool, len(part.cores)) for part in dealt] == [("0", "prefill", 2), ("1", "decode", 2)]
    cores = cores_by_rank(dealt)
    assert {key: part.nodes for key, part in cores.items()} == {
        ("prefill/0", 0): (0,),
        ("prefill/0", 1): (1,),
        ("decode/0", 0): (0,),
        ("decode/0", 1): (1,),
    }
    assert [part.num_threads for part in cores_of(cores, plan.replicas[1]).values()] == [2, 2]


def test_a_launcher_that_may_use_less_of_a_machine_deals_out_less() -> None:
    assert threads(topology(["far:1", "far:2"]), {"0": machine(12), "1": machine(4)}) == {"0": 6, "1": 2}


def test_hosts_whose_launchers_have_not_answered_are_left_out() -> None:
    plan = topology(["local", "far:1"])
    dealt = plan_cores(plan, machines=local_machines(plan, environment={"OMP_NUM_THREADS": "5"}))
    assert [(part.host, part.num_threads) for part in dealt] == [("0", 5)]
    assert cores_of(cores_by_rank(dealt), plan.replicas[1]) == {}


def test_a_launchers_operator_stands_above_the_file_and_the_file_above_the_share() -> None:
    plan = topology(["far:1", "near:1"], threads={"prefill": 3, "decode": 3})
    assert threads(plan, {"0": machine(8), "1": machine(2, threads_per_rank=5)}) == {"0": 3, "1": 5}


def test_more_threads_than_a_host_has_cores_are_refused_with_pool_host_and_cores() -> None:
    plan = topology(["far:1", "near:1"], threads={"decode": 3})
    with pytest.raises(ValueError, match=r"pools\.decode on host 1: threads 3 are more than the 2 cores there"):
        plan_cores(plan, machines={"0": machine(8), "1": machine(2)})


def test_ranks_on_gpus_are_kept_to_no_node() -> None:
    plan = topology(["far:1"], dp=2, device="cuda")
    (part,) = plan_cores(plan, machines={"0": machine(4, 4)})
    assert [(cores.num_threads, cores.nodes, cores.cores) for cores in part.cores.values()] == [(4, (), ())] * 2
