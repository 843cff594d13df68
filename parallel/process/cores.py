"""How many cores this process may use: of the machine's, those that its affinity and its cgroups leave it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("sys/fs/cgroup")


def available_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least one. `root` is the folder of `proc` and `sys`."""
    return max(1, int(min([_affinity(), *_quotas(root)])))


def threads_per_rank(num_ranks: int) -> int:
    """This process's cores shared by `num_ranks`, at least one each."""
    return max(1, available_cores() // max(1, num_ranks))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """The cores that each cgroup above this process may use, of both versions; a group without a limit is left out."""
    for folder in _groups(root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # version 2: "150000 100000", or "max 100000"
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError, ZeroDivisionError):  # version 1: -1 is no limit
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                yield int(quota) / int((folder / "cpu.cfs_period_us").read_text())


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups, each with all above it: a limit anywhere on the way counts.

    In a container the path may be that of the host, of which only the end, the mount itself, is there.
    """
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / _CGROUPS / controllers
        if not mount.is_dir():
            mount = root / _CGROUPS / "cpu"
        group = Path(path.lstrip("/"))
        yield from (mount / above for above in (group, *group.parents))
