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


def usage(pid: int) -> Usage:
    """Of the living process `pid`."""
    process = psutil.Process(pid)
    return Usage(
        resident_bytes=process.memory_info().rss,
        threads=process.num_threads(),
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )
