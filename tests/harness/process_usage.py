"""What a process holds of the system, by its entries under /proc."""

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Memory in bytes, the rest in numbers."""

    resident_bytes: int
    threads: int
    files: int


def openmp_runtimes(pid: int) -> set[str]:
    """The OpenMP libraries that the process `pid` has loaded, GNU's, LLVM's or Intel's."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.split()[-1] for line in lines if "/" in line}
    return {name for name in names if Path(name).name.startswith(("libgomp", "libomp", "libiomp"))}


def cpu_s(pid: int) -> float:
    """CPU seconds that all threads of the living process `pid` have used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def usage(pid: int) -> Usage:
    """Of the living process `pid`."""
    process = psutil.Process(pid)
    return Usage(
        resident_bytes=process.memory_info().rss,
        threads=process.num_threads(),
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )
