"""What every process of a running service holds, at several moments, and whether it goes on growing."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.harness.process_usage import Usage, usage
from tests.harness.router_process import command_line, descendants, rank_pids

#: Of what was held after the first requests; a handful of files and threads may come and go.
_TOLERANCE, _SPARE = 0.05, 3


@dataclass(frozen=True, kw_only=True)
class Look:
    """The service after so many requests: what each process holds, by its name."""

    requests: int
    by_process: Mapping[str, Usage]


def look(router_pid: int, *, requests: int) -> Look:
    """What the router, its launcher and its ranks hold now."""
    (launcher,) = [pid for pid in descendants(router_pid) if "--exit-with-stdin" in command_line(pid)]
    named = {"router": router_pid, "launcher": launcher}
    named |= {f"rank {index}": pid for index, pid in enumerate(rank_pids(router_pid))}
    return Look(requests=requests, by_process={name: usage(pid) for name, pid in named.items()})


def growth(first: Look, last: Look) -> list[str]:
    """A sentence for each thing that a process holds more of in `last`, beyond the tolerance."""
    found = []
    for name, before in first.by_process.items():
        after = last.by_process[name]
        if after.resident_bytes > (1 + _TOLERANCE) * before.resident_bytes:
            sizes = f"{_mb(before)} MB after {first.requests}, {_mb(after)} MB after {last.requests}"
            found.append(f"{name}: resident {sizes}")
        for what in ("threads", "files"):
            held, now = getattr(before, what), getattr(after, what)
            if now > (1 + _TOLERANCE) * held + _SPARE:
                found.append(f"{name}: {what} {held} after {first.requests}, {now} after {last.requests}")
    return found


def table(looks: list[Look]) -> str:
    """Resident MB, threads and files of each process at each look."""
    lines = ["requests  " + "".join(f"{name:>20}" for name in looks[0].by_process)]
    for each in looks:
        cells = (f"{_mb(item)} MB {item.threads:3} {item.files:4}" for item in each.by_process.values())
        lines.append(f"{each.requests:8}  " + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _mb(item: Usage) -> str:
    return f"{item.resident_bytes / 1e6:.1f}"
