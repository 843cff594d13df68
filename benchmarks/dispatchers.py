"""The two dispatchers against each other over the rows of a step, and what the chooser picks.

Run: `python -m benchmarks.dispatchers`. Processes of one thread each; rows go to their experts and come back, and the
experts give them as they are: what is measured is the dispatch of one layer. No checkpoint is needed.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.local_groups import run_ranks
from benchmarks.report import Report
from moe.dispatch_choice import Dispatch, DispatchPolicy
from moe.dispatchers import Dispatchers
from moe.routed_rows import RoutedRows, RowFormat
from parallel.collectives.communicator import Communicator
from parallel.link import LINKS, Link
from parallel.shape import ExpertSizes

#: (ep, experts, of which a row chooses).
GATES = ((2, 8, 1), (2, 8, 2), (2, 8, 8), (4, 16, 1), (4, 16, 2))
ROWS = (1, 8, 64, 256, 1024)
#: Runs of each case that are not counted: memory is taken in them.
_WARM_UP = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` a rank, each of which chooses `top_k` of `num_experts` evenly."""

    ep: int
    num_experts: int
    top_k: int
    rows: int


#: Seconds of each call by case, link and dispatcher.
Samples = dict[tuple[Case, Link, Dispatch], list[float]]


def policy(case: Case, *, hidden_size: int, link: Link, forced: Dispatch | None = None) -> DispatchPolicy:
    """That of a rank in float32."""
    return DispatchPolicy(
        sizes=ExpertSizes(ep=case.ep),
        top_k=case.top_k,
        row_bytes=4 * hidden_size,
        link=LINKS[link],
        forced=forced,
    )


class _AsTheyAre:
    """Experts that give their rows back."""

    def run(self, rows: RoutedRows, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts."""
        return rows.x.contiguous() if plus is None else plus + rows.x


def measure(groups: Mapping[Link, Communicator], *, wanted: Sequence[Case], hidden_size: int, runs: int) -> Samples:
    """One rank."""
    samples: Samples = defaultdict(list)
    with torch.inference_mode():
        for case in wanted:
            for run in range(-_WARM_UP, runs):
                for link, group in groups.items():
                    for kind in Dispatch:
                        seconds = _layer(
                            case, kind, hidden_size=hidden_size, link=link, group=group, seed=run + _WARM_UP
                        )
                        if run >= 0:
                            samples[case, link, kind].append(seconds)
    return dict(samples)


def _layer(case: Case, kind: Dispatch, *, hidden_size: int, link: Link, group: Communicator, seed: int) -> float:
    """Seconds of one layer's way there and back, begun by all ranks together."""
    slots_per_rank = case.num_experts // case.ep
    dispatchers = Dispatchers(
        group,
        policy=policy(case, hidden_size=hidden_size, link=link, forced=kind),
        slots_per_rank=slots_per_rank,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(1000 * seed + group.index)
    form = RowFormat(hidden_size=hidden_size, dtype=torch.float32, top_k=case.top_k)
    rows = form.empty(case.rows, device=torch.device("cpu"))
    rows.x.normal_(generator=generator)
    rows.slots.copy_(torch.rand((case.rows, case.num_experts), generator=generator).topk(case.top_k).indices)
    rows.weights.fill_(1 / case.top_k)
    residual = torch.zeros((case.rows, hidden_size))
    dispatcher = dispatchers.choose(padded_rows=case.rows)
    group.all_gather(torch.zeros(1))
    started = time.perf_counter()
    dispatcher.run(rows, _AsTheyAre(), residual=residual)
    return time.perf_counter() - started


def run(*, hidden_size: int, runs: int) -> dict[tuple[Case, Link, Dispatch], float]:
    """The slowest rank's seconds, medians over the runs."""
    found = {}
    for ep in dict.fromkeys(gate[0] for gate in GATES):
        wanted = [
            Case(ep=ep, num_experts=experts, top_k=top_k, rows=rows)
            for size, experts, top_k in GATES
            if size == ep
            for rows in ROWS
        ]
        ranks: list[Samples] = run_ranks(ep, partial(measure, wanted=wanted, hidden_size=hidden_size, runs=runs))
        for key in ranks[0]:
            found[key] = statistics.median(map(max, *(samples[key] for samples in ranks)))
    return found


def report(seconds: Mapping[tuple[Case, Link, Dispatch], float], *, hidden_size: int, runs: int) -> None:
    """The table and the plot."""
    page = Report(
        "dispatchers",
        title="Rows to their experts: gather beside all-to-all",
        about=f"The way of a layer's rows of {hidden_size} float32 to their experts and back, without the experts' "
        f"work, one thread a rank; the slowest rank's microseconds, medians of {runs} interleaved runs.",
        headings=("link, ep, choice", "rows", *(kind.value for kind in Dispatch), "picked", "over fastest"),
    )
    for case, link in sorted(dict.fromkeys((case, link) for case, link, _ in seconds), key=lambda item: item[1].value):
        by_kind = {kind: seconds[case, link, kind] for kind in Dispatch}
        choice = policy(case, hidden_size=hidden_size, link=link).choose(padded_rows=case.rows)
        page.add(
            f"{link.value}, ep {case.ep}, {case.top_k} of {case.num_experts}",
            str(case.rows),
            *(f"{by_kind[kind] * 1e6:.0f}" for kind in Dispatch),
            choice.value,
            f"{by_kind[choice] / min(by_kind.values()):.2f}",
        )

    def plot(axes: Any) -> None:
        for ep, experts, top_k in GATES:
            by_rows = [Case(ep=ep, num_experts=experts, top_k=top_k, rows=rows) for rows in ROWS]
            ratios = [
                seconds[case, Link.SHARED_MEMORY, Dispatch.ALL_TO_ALL]
                / seconds[case, Link.SHARED_MEMORY, Dispatch.GATHER]
                for case in by_rows
            ]
            axes.plot(ROWS, ratios, marker="o", label=f"ep {ep}, {top_k} of {experts}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("rows a rank, in shared memory")
        axes.set_ylabel("time of all-to-all over gather")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--runs", type=int, default=41)
    options = parser.parse_args()
    report(run(hidden_size=options.hidden, runs=options.runs), hidden_size=options.hidden, runs=options.runs)


if __name__ == "__main__":
    main()
