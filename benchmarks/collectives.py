"""Collectives between the ranks of one host: gloo beside shared memory.

Run: `python -m benchmarks.collectives`. The ranks are processes of one thread; in turn they run some calls over gloo
and as many over shared memory, so that what else the machine does meets both.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from benchmarks.report import Report
from native.build import Build
from native.library import NativeLibrary
from parallel.collectives.communicator import Channel, CollectiveClock, Communicator
from parallel.collectives.gloo import GlooCommunicator
from parallel.collectives.shared_memory import SharedMemoryCommunicator, WaitLimits
from parallel.group_memory import GroupMemoryShape, allocate_group_memory
from parallel.process.cores import available_cores

VERBS = ("all-gather", "reduce-scatter", "all-to-all", "send and back")
KINDS = ("gloo", "shared memory")
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every rank runs: for each size `rounds` times `calls` of each verb over each kind."""

    num_ranks: int
    sizes: Sequence[int]  # bytes that a rank gives; of reduce-scatter and all-to-all over all ranks
    rounds: int
    calls: int

    def calls_of(self, num_bytes: int) -> int:
        """Fewer of large ones."""
        return max(5, self.calls // (8 if num_bytes >= 1 << 20 else 1))


#: Microseconds of each call by (verb, kind, bytes).
Samples = dict[tuple[str, str, int], list[float]]


def measure(plan: Plan) -> Samples:
    """Starts the ranks; the samples are those of the first."""
    Build().make()
    context = multiprocessing.get_context("spawn")
    descriptor = allocate_group_memory(GroupMemoryShape(size=plan.num_ranks))
    mine, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        where = (f"/proc/{os.getpid()}/fd/{descriptor}", str(Path(folder) / "store"))
        processes = [
            context.Process(target=run_rank, args=(plan, index, *where, theirs), daemon=True)
            for index in range(plan.num_ranks)
        ]
        try:
            for process in processes:
                process.start()
            theirs.close()
            samples: Samples = mine.recv()
            return samples
        finally:
            for process in processes:
                process.join(10)
                process.kill()
            os.close(descriptor)


def run_rank(plan: Plan, index: int, memory: str, store: str, samples_to: Connection) -> None:
    """One rank's whole life."""
    torch.set_num_threads(1)
    groups = {
        "gloo": join_gloo(plan.num_ranks, index, store),
        "shared memory": join_memory(plan.num_ranks, index, memory),
    }
    samples: Samples = defaultdict(list)
    for num_bytes in plan.sizes:
        for turn in range(plan.rounds + 1):  # the first is not counted
            for verb in VERBS:
                for kind, group in groups.items():
                    found = time_calls(group, verb, num_bytes=num_bytes, count=plan.calls_of(num_bytes))
                    if turn:
                        samples[verb, kind, num_bytes] += found
    groups["shared memory"].all_gather(torch.zeros(1))
    if index == 0:
        samples_to.send(dict(samples))


def join_gloo(size: int, index: int, store: str) -> Communicator:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    group = gloo(FileStore(store, size), index, size, options)
    return GlooCommunicator(group, size=size, index=index, clock=CollectiveClock())


def join_memory(size: int, index: int, memory: str) -> Communicator:
    path = Build().find()
    assert path is not None, "built before the ranks were started"
    spins = size <= available_cores()
    return SharedMemoryCommunicator(
        memory,
        shape=GroupMemoryShape(size=size),
        index=index,
        library=NativeLibrary(path),
        limits=WaitLimits(build_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S, spins=spins),
        clock=CollectiveClock(),
    )


def time_calls(group: Communicator, verb: str, *, num_bytes: int, count: int) -> list[float]:
    """Microseconds of each of `count` calls, after a collective that brings the ranks together."""
    call = make_call(group, verb, num_bytes=num_bytes)
    group.all_gather(torch.zeros(1))
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    return times


def make_call(group: Communicator, verb: str, *, num_bytes: int) -> Callable[[], object]:
    """One call; of a message it is the way to the next rank and, from the rank before, one of its own."""
    x = torch.ones(num_bytes // 4)
    if verb == "all-gather":
        return lambda: group.all_gather(x)
    parts = x.view(group.size, -1)
    if verb == "reduce-scatter":
        return lambda: group.reduce_scatter(parts)
    if verb == "all-to-all":
        return lambda: group.all_to_all(parts)
    return make_exchange(group, x)


def make_exchange(group: Communicator, x: torch.Tensor) -> Callable[[], object]:
    """There and back between the ranks of a pair; others have nothing to do."""
    other, out = group.index ^ 1, torch.empty_like(x)

    def first() -> None:
        group.send(x, to=other, channel=Channel.HIDDEN)
        group.receive(out, source=other, channel=Channel.HIDDEN)

    def second() -> None:
        group.receive(out, source=other, channel=Channel.HIDDEN)
        group.send(x, to=other, channel=Channel.HIDDEN)

    return first if group.index % 2 == 0 else second


def report(results: dict[int, Samples], *, sizes: Sequence[int], rounds: int, calls: int) -> None:
    """The table and the plot."""
    page = Report(
        "collectives",
        title="Collectives between the ranks of one host",
        about="Microseconds of a call through the communicator on rank 0, median (99th percentile): gloo over the "
        "loopback device and shared memory, in turn in the same processes, "
        f"{rounds} rounds of {calls} calls (an eighth from 1 MB on). Bytes are what one rank gives; reduce-scatter and "
        "all-to-all share them out over the ranks. `send and back` is a message and its answer between two ranks, by "
        "pairs.",
        headings=("verb, ranks", *(size_name(num_bytes) for num_bytes in sizes)),
    )
    for num_ranks, samples in results.items():
        for verb in VERBS:
            for kind in KINDS:
                cells = (cell(samples[verb, kind, num_bytes]) for num_bytes in sizes)
                page.add(f"{verb}, {num_ranks}, {kind}", *cells)

    def plot(axes: Any) -> None:
        for num_ranks, samples in results.items():
            for kind in KINDS:
                medians = [statistics.median(samples["all-gather", kind, num_bytes]) for num_bytes in sizes]
                axes.plot(sizes, medians, marker="o", label=f"{kind}, {num_ranks} ranks")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [size_name(num_bytes) for num_bytes in sizes])
        axes.set_xlabel("bytes that a rank gives to an all-gather")
        axes.set_ylabel("microseconds, median")
        axes.legend()

    page.publish(plot)


def cell(times: Sequence[float]) -> str:
    """Median and 99th percentile."""
    return f"{statistics.median(times):.0f} ({sorted(times)[int(len(times) * 0.99)]:.0f})"


def size_name(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[1, 4, 64, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=80)
    options = parser.parse_args()
    sizes = [kilobytes << 10 for kilobytes in options.kilobytes]
    results = {
        num_ranks: measure(Plan(num_ranks=num_ranks, sizes=sizes, rounds=options.rounds, calls=options.calls))
        for num_ranks in options.ranks
    }
    report(results, sizes=sizes, rounds=options.rounds, calls=options.calls)


if __name__ == "__main__":
    main()
