"""Memory for groups on the launcher's side: which groups get some, who can open it, and its end."""

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from native.build import Build
from parallel.group_memory import link_of, memory_shape
from parallel.link import Link
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.topology import HostSpec, PoolSpec, plan_topology
from parallel.wire import assign_request
from proto import control_pb2
from worker.launcher import group_memories
from worker.launcher.group_memories import GroupMemories, find_local_groups

SHAPE = ReplicaShape(pp=2, attention=AttentionSizes(cp=2, tp=2), experts=None)


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    Build().make()
    yield


def requests(*devices: int, kernels: str = "auto") -> list[control_pb2.AssignRequest]:
    """Of a replica over hosts with so many devices each, one a host."""
    hosts = [
        HostSpec(name=f"h{index}", address="local", device="cpu", devices=tuple(range(count)))
        for index, count in enumerate(devices)
    ]
    engine = EngineSettings(kernels=kernels)
    pool = PoolSpec(name="unified", replicas=1, shape=SHAPE, engine=engine, hosts=tuple(host.name for host in hosts))
    replica = plan_topology(model="m", hosts=hosts, pools=[pool]).replicas[0]
    return [
        assign_request(
            replica,
            host=host,
            addresses=("127.0.0.1", "127.0.0.1"),
            rendezvous_port=1,
            model="m",
            router_id=1,
            epoch=1,
            secret=1,
            start_timeout_s=1,
        )
        for host in hosts
    ]


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("devices", [(8,), (4, 4), (2, 6), (3, 5), (1, 7), (2, 2, 2, 2), (1, 2, 2, 3)])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_every_rank_of_a_group_meets_the_others_over_what_the_router_says(
    devices: tuple[int, ...], kernels: str
) -> None:
    found = requests(*devices, kernels=kernels)
    hosts = {given.global_rank: str(index) for index, request in enumerate(found) for given in request.ranks}
    for request in found:
        memories = GroupMemories(request)
        for given in request.ranks:
            shared = {tuple(group.ranks) for group in memories.of_rank(given.global_rank)}
            for group in given.groups:
                ranks = tuple(group.ranks)
                link = Link.SHARED_MEMORY if ranks in shared else Link.GLOO
                assert link_of(ranks, hosts=hosts, device="cpu", kernels=kernels) is link
        memories.close()


def test_groups_whose_ranks_one_launcher_holds_share_memory_and_others_do_not() -> None:
    (whole,) = requests(8)
    assert find_local_groups(whole) == sorted({tuple(group.ranks) for given in whole.ranks for group in given.groups})
    stages = [find_local_groups(request) for request in requests(4, 4)]
    assert stages == [
        [(0, 1), (0, 2), (1, 3), (2, 3)],
        [(4, 5), (4, 5, 6, 7), (4, 6), (5, 7), (6, 7)],
    ]
    assert [find_local_groups(request) for request in requests(3, 5)] == [
        [(0, 1), (0, 2)],
        [(3, 7), (4, 5), (4, 5, 6, 7), (4, 6), (5, 7), (6, 7)],
    ]


def test_ranks_that_could_not_load_the_library_are_given_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Build(folders=(tmp_path,))
    broken.make().write_text("no library")
    monkeypatch.setattr(group_memories, "Build", lambda: broken)
    (request,) = requests(8)
    with caplog.at_level(logging.WARNING):
        assert GroupMemories(request).of_rank(0) == []
    (record,) = caplog.records
    assert record.getMessage().startswith("no memory for the groups of unified/0, they use gloo: ")


def test_a_rank_gets_the_memory_of_its_own_groups_and_another_process_can_open_it() -> None:
    request, _ = requests(4, 4)
    memories = GroupMemories(request)
    try:
        groups = memories.of_rank(1)
        assert [tuple(group.ranks) for group in groups] == [(0, 1), (1, 3)]
        program = "import os, sys; print(os.path.getsize(sys.argv[1]), open(sys.argv[1], 'r+b').read(1))"
        for group in groups:
            command = [sys.executable, "-c", program, group.path]
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
            num_bytes = memory_shape(tuple(group.ranks), shape=SHAPE).num_bytes
            assert said == f"{num_bytes} {bytes(1)!r}\n"
    finally:
        memories.close()


def test_memory_ends_with_its_epoch() -> None:
    before = num_descriptors()
    memories = GroupMemories(requests(8)[0])
    assert num_descriptors() > before
    memories.close()
    memories.close()
    assert num_descriptors() == before
    assert memories.of_rank(0) == []


def test_without_native_kernels_or_on_a_gpu_there_is_none() -> None:
    (torch_kernels,) = requests(8, kernels="torch")
    (cuda,) = requests(8)
    cuda.device_kind = "cuda"
    assert GroupMemories(torch_kernels).of_rank(0) == GroupMemories(cuda).of_rank(0) == []


def test_where_there_is_no_room_all_groups_of_a_replica_use_gloo(caplog: pytest.LogCaptureFixture) -> None:
    before = num_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        memories = GroupMemories(requests(8)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert memories.of_rank(0) == []
    assert caplog.messages == [f"no memory for the groups of unified/0, they use gloo: {os.strerror(27)}"]
    assert num_descriptors() == before
