"""The cores that this process may use: of the machine's, those that its affinity and its cgroups leave it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from parallel.cores import Machine, Node

_CGROUPS = Path("sys/fs/cgroup")
_NODES = Path("sys/devices/system/node")
#: Set for all programs that compute with several threads, by whoever starts them.
THREADS_VARIABLE = "OMP_NUM_THREADS"


def available_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least one. `root` is the folder of `proc` and `sys`."""
    return max(1, int(min([len(_affinity()), *_quotas(root)])))


def this_machine(*, threads_per_rank: int | None = None, root: Path = Path("/")) -> Machine:
    """The machine as this process may use it; `threads_per_rank` is its operator's word, where it was given."""
    return Machine(nodes=tuple(_nodes(root)), num_cores=available_cores(root), threads_per_rank=threads_per_rank)


def threads_of(environment: Mapping[str, str]) -> int | None:
    """The threads that `environment` asks for: the outermost of a list; None where it says none that can be."""
    outermost = environment.get(THREADS_VARIABLE, "").split(",")[0].strip()
    return int(outermost) or None if outermost.isdecimal() else None


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _nodes(root: Path) -> list[Node]:
    """The NUMA nodes with cores that this process may use; a single one where the system does not tell of all cores."""
    usable, found = _affinity(), []
    for folder in (root / _NODES).glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            cores = usable & _listed((folder / "cpulist").read_text())
            found.append(Node(index=int(folder.name.removeprefix("node")), cores=tuple(sorted(cores))))
    if sum(len(node.cores) for node in found) != len(usable):
        return [Node(index=0, cores=tuple(sorted(usable)))]
    return sorted((node for node in found if node.cores), key=lambda node: node.index)


def _listed(text: str) -> set[int]:
    """The numbers of a list as the system writes them: "0-3,8,10-11"."""
    spans = (span.partition("-") for span in text.strip().split(",") if span)
    return {core for first, _, last in spans for core in range(int(first), int(last or first) + 1)}


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
