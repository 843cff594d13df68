"""The cores that a process may use: its affinity, the quotas of its cgroups in both versions, and its NUMA nodes."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from parallel.process.cores import available_cores, this_machine, threads_of

V1 = "3:cpuset:/\n4:cpu,cpuacct:/pod/box\n5:memory:/deep\n"


@pytest.fixture
def affinity_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def machine(folder: Path, *, cgroup: str, files: Mapping[str, str]) -> Path:
    """A root with /proc/self/cgroup and files under /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{key}": files[key] for key in files}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.usefixtures("affinity_of_8")
@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000\n", "a/cpu.max": "500000 100000\n"}, 2),
        # A container that sees the host's path, while its own group is what is mounted.
        ("0::/host/box\n", {"cpu.max": "400000 100000\n"}, 4),
        (V1, {"cpu,cpuacct/pod/box/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/pod/box/cpu.cfs_period_us": "50000"}, 5),
        (V1, {"cpu,cpuacct/pod/box/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000\n"}, 8),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "600000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, 6),
        ("2:cpuacct:/x\n1:cpu:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "7", "cpu/x/cpu.cfs_period_us": "2"}, 3),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_cores_are_those_that_affinity_and_every_cgroup_above_leave(
    cgroup: str, files: dict[str, str], cores: int, tmp_path: Path
) -> None:
    assert available_cores(machine(tmp_path, cgroup=cgroup, files=files)) == cores


@pytest.mark.usefixtures("affinity_of_8")
def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 8


def test_the_affinity_of_this_process_counts() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def nodes(folder: Path, lists: Mapping[str, str]) -> dict[int, tuple[int, ...]]:
    """Those of a machine with these cpulist files, by name of their node."""
    for name, text in lists.items():
        path = folder / "sys/devices/system/node" / name / "cpulist"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return {node.index: node.cores for node in this_machine(root=folder).nodes}


@pytest.mark.usefixtures("affinity_of_8")
@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ({"node0": "0-7\n"}, {0: tuple(range(8))}),
        ({"node10": "2-3,6-7\n", "node2": "0-1,4,5\n"}, {2: (0, 1, 4, 5), 10: (2, 3, 6, 7)}),
        # Cores that this process may not use, memory without cores, and what is no node.
        ({"node0": "0-3,64-127\n", "node1": "4-7\n", "node2": "\n"}, {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}),
        ({"node0": "0-7\n", "node1": "8-15\n"}, {0: tuple(range(8))}),
        # What does not tell of every core, or cannot be read, tells of none.
        ({"node0": "0-3\n"}, {0: tuple(range(8))}),
        ({"node0": "0-3\n", "node1": "4-x\n"}, {0: tuple(range(8))}),
        ({}, {0: tuple(range(8))}),
    ],
)
def test_nodes_have_the_cores_that_this_process_may_use(
    lists: dict[str, str], found: dict[int, tuple[int, ...]], tmp_path: Path
) -> None:
    assert nodes(tmp_path, lists) == found


def test_this_machine_has_nodes_for_all_its_cores() -> None:
    machine = this_machine(threads_per_rank=3)
    assert {core for node in machine.nodes for core in node.cores} == os.sched_getaffinity(0)
    assert (machine.num_cores, machine.threads_per_rank) == (available_cores(), 3)


@pytest.mark.parametrize(
    ("text", "threads"), [("7", 7), (" 4,2,1", 4), ("0", None), ("", None), ("-3", None), ("many", None), ("²", None)]
)
def test_an_environments_threads_are_the_outermost_where_it_says_some(text: str, threads: int | None) -> None:
    assert threads_of({"OMP_NUM_THREADS": text}) == threads
    assert threads_of({}) is None
