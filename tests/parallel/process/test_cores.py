"""The cores that a process may use: its affinity, and the quotas of its cgroups in both versions."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from parallel.process.cores import available_cores, threads_per_rank

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


def test_ranks_share_the_cores_and_each_has_one() -> None:
    cores = available_cores()
    assert [threads_per_rank(num_ranks) for num_ranks in (0, 1, cores, 10 * cores)] == [cores, cores, 1, 1]
