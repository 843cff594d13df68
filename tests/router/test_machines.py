"""Hosts that are one machine share its cores; only ranks count, not devices."""

import pytest

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, plan_topology
from router.machines import ranks_of_machines


@pytest.mark.parametrize(
    ("addresses", "shares"),
    [
        (["local", "local", "far:1"], [2, 2, 1]),
        (["local", "[::1]:1", "127.0.0.1:2"], [3, 3, 3]),
        (["far:1", "far:2", "near:1"], [2, 2, 1]),
    ],
)
def test_the_ranks_of_every_host_at_one_machine_count(addresses: list[str], shares: list[int]) -> None:
    hosts = [
        HostSpec(name=str(index), address=address, device="cpu", devices=(0, 1, 2, 3))
        for index, address in enumerate(addresses)
    ]
    pools = [
        PoolSpec(
            name=name,
            replicas=1,
            shape=ReplicaShape(attention=AttentionSizes(), experts=None),
            engine=EngineSettings(),
            hosts=(str(index),),
        )
        for index, name in enumerate(("prefill", "decode", "unified"))
    ]
    topology = plan_topology(model="", hosts=hosts, pools=pools)
    assert list(ranks_of_machines(topology).values()) == shares
