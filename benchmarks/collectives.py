"""Collectives between the ranks of one host: gloo beside shared memory.

Run: `python -m benchmarks.collectives`. The ranks are processes of one thread; in turn they run some calls over gloo
and as many over shared memory, so that what else the machine does meets both.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.local_groups import run_ranks
from benchmarks.report import Report
from parallel.collectives.communicator import Channel, Communicator
from parallel.link import Link

VERBS = ("all-gather", "reduce-scatter", "all-to-all", "send and back")
KINDS = (Link.GLOO.value, Link.SHARED_MEMORY.value)


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
    first: Samples = run_ranks(plan.num_ranks, partial(run_rank, plan=plan))[0]
    return first


def run_rank(groups: Mapping[Link, Communicator], *, plan: Plan) -> Samples:
    """What one rank does."""
    samples: Samples = defaultdict(list)
    for num_bytes in plan.sizes:
        for turn in range(plan.rounds + 1):  # the first is not counted
            for verb in VERBS:
                for link, group in groups.items():
                    found = time_calls(group, verb, num_bytes=num_bytes, count=plan.calls_of(num_bytes))
                    if turn:
                        samples[verb, link.value, num_bytes] += found
    return dict(samples)


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
