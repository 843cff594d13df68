"""Placement: order, exactness, and a digest that names the plan and not the file."""

import pytest

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, Topology, plan_topology


def host(name: str, *devices: int) -> HostSpec:
    return HostSpec(name=name, address=f"{name}:1", device="cpu", devices=devices)


def pool(name: str, *, dp: int, replicas: int = 1, hosts: tuple[str, ...] = ()) -> PoolSpec:
    shape = ReplicaShape(attention=AttentionSizes(dp=dp), experts=ExpertSizes(ep=dp))
    return PoolSpec(name=name, replicas=replicas, shape=shape, engine=EngineSettings(), hosts=hosts)


def places(topology: Topology) -> list[tuple[str, str, int]]:
    return [(replica.name, place.host, place.device) for replica in topology.replicas for place in replica.placements]


def test_ranks_fill_the_hosts_in_order() -> None:
    topology = plan_topology(
        model="m",
        hosts=[host("a", 0, 1, 2), host("b", 5, 7)],
        pools=[pool("prefill", dp=2), pool("decode", dp=1, replicas=3)],
    )
    assert places(topology) == [
        ("prefill/0", "a", 0),
        ("prefill/0", "a", 1),
        ("decode/0", "a", 2),
        ("decode/1", "b", 5),
        ("decode/2", "b", 7),
    ]


def test_a_replica_may_span_hosts() -> None:
    topology = plan_topology(model="m", hosts=[host("a", 0), host("b", 0, 1)], pools=[pool("unified", dp=3)])
    (replica,) = topology.pool("unified")
    assert replica.hosts == ("a", "b")
    assert replica.ranks_on("a") == (0,)
    assert replica.ranks_on("b") == (1, 2)


def test_a_pool_takes_its_own_hosts_in_the_order_it_names_them() -> None:
    topology = plan_topology(
        model="m",
        hosts=[host("a", 0, 1), host("b", 0, 1)],
        pools=[pool("prefill", dp=3, hosts=("b", "a")), pool("decode", dp=1)],
    )
    assert [entry[1:] for entry in places(topology)] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]


def test_a_pool_that_names_no_host_leaves_those_of_one_that_does() -> None:
    topology = plan_topology(
        model="m",
        hosts=[host("a", 0, 1), host("b", 0, 1)],
        pools=[pool("prefill", dp=2), pool("decode", dp=2, hosts=("a",))],
    )
    assert [replica.name for replica in topology.replicas] == ["prefill/0", "decode/0"]
    assert [replica.hosts for replica in topology.replicas] == [("b",), ("a",)]


def test_without_hosts_of_its_own_a_pool_keeps_expert_groups_together() -> None:
    free, named = (
        plan_topology(model="m", hosts=[host("a", 0), host("b", 0, 1)], pools=[pool("unified", dp=2, hosts=hosts)])
        for hosts in ((), ("a", "b"))
    )
    assert free.replicas[0].hosts == ("b",)
    assert named.replicas[0].hosts == ("a", "b")


def test_an_error_of_many_hosts_does_not_list_them_all() -> None:
    hosts = [host(f"h{index}", 0) for index in range(100)]
    with pytest.raises(ValueError, match=r"its hosts h0 \.\. h99 \(100\) have 100 left"):
        plan_topology(model="m", hosts=hosts, pools=[pool("unified", dp=101)])


@pytest.mark.parametrize(
    ("devices", "kind", "shares"),
    [((4, 4), "cpu", True), ((2, 8), "cpu", True), ((3, 8), "cpu", False), ((8,), "cuda", False)],
)
def test_the_ranks_of_a_stage_share_the_output_where_all_replicas_have_them_on_the_cpu_of_one_host(
    devices: tuple[int, ...], kind: str, shares: bool
) -> None:
    hosts = [
        HostSpec(name=f"h{index}", address="local", device=kind, devices=tuple(range(count)))
        for index, count in enumerate(devices)
    ]
    shape = ReplicaShape(attention=AttentionSizes(dp=2), experts=None)
    names = tuple(host.name for host in hosts)
    pool = PoolSpec(name="unified", replicas=4, shape=shape, engine=EngineSettings(), hosts=names)
    topology = plan_topology(model="m", hosts=hosts, pools=[pool])
    assert {replica.shape.shares_output for replica in topology.replicas} == {shares}


def test_no_device_is_given_twice() -> None:
    topology = plan_topology(
        model="m",
        hosts=[host("a", 0, 1, 2, 3), host("b", 0, 1, 2, 3)],
        pools=[pool("prefill", dp=2, replicas=2, hosts=("b",)), pool("decode", dp=4)],
    )
    taken = [entry[1:] for entry in places(topology)]
    assert len(taken) == len(set(taken)) == 8


def test_too_few_devices_is_an_error_with_both_counts() -> None:
    with pytest.raises(ValueError, match=r"pool decode needs 4 devices \(replicas 2 x pp 1 x stage 2\).* a, b have 3"):
        plan_topology(
            model="m",
            hosts=[host("a", 0, 1), host("b", 0, 1, 2)],
            pools=[pool("prefill", dp=2), pool("decode", dp=2, replicas=2)],
        )


def test_a_host_named_twice_by_a_pool_gives_its_devices_once() -> None:
    with pytest.raises(ValueError, match=r"needs 2 devices .* have 1 left"):
        plan_topology(model="m", hosts=[host("a", 0)], pools=[pool("unified", dp=2, hosts=("a", "a"))])


def test_the_digest_differs_between_plans() -> None:
    hosts = [host("a", 0, 1, 2, 3)]
    plans = [
        plan_topology(model="m", hosts=hosts, pools=[pool("unified", dp=2)]),
        plan_topology(model="n", hosts=hosts, pools=[pool("unified", dp=2)]),
        plan_topology(model="m", hosts=hosts, pools=[pool("unified", dp=1, replicas=2)]),
        plan_topology(model="m", hosts=[host("a", 0, 1, 2)], pools=[pool("unified", dp=2)]),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_equal_plans_have_one_digest() -> None:
    first, second = (plan_topology(model="m", hosts=[host("a", 0, 1)], pools=[pool("unified", dp=2)]) for _ in range(2))
    assert first.digest == second.digest
    assert len(first.digest) == 16
