"""The three exchanges against each other over the share of cached tokens, and what the chooser picks.

Run: `python -m benchmarks.exchange_strategies`. Two processes of one thread each, one layer of the dense demo model's
sizes over random KV; no checkpoint is needed. In turn they meet over gloo with torch's attention and in shared memory
with the native one.
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

from attention.exchange.choice import REMOTE, ExchangePolicy, Strategy
from attention.exchange.member import CpMember
from attention.exchange.plan import Exchange, plan_exchange
from attention.interface import AttentionBackend, AttentionSpec
from attention.layer_memory import LayerFormat, bind_layer
from attention.select import create_backend
from benchmarks.exchange_steps import StepChunk, cache_group, exchange_policy, exchange_rows
from benchmarks.local_groups import load_native, run_ranks
from benchmarks.report import Report
from parallel.collectives.communicator import Communicator
from parallel.link import LINKS, Link
from parallel.storage import lay_out_page

CP = 2
PAGE_SIZE = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
#: New tokens over all tokens, and a decode step's one token as 0.
NEW_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.06, 0.03, 0.01, 0.0)
GROUP = cache_group(num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM)
PAGE = lay_out_page(GROUP.planes, page_size=PAGE_SIZE, num_heads=NUM_KV_HEADS, dtype="float32")
FORM = LayerFormat(page=PAGE, key=GROUP.key, value=GROUP.value, scale=HEAD_DIM**-0.5)
SPEC = AttentionSpec(num_heads=NUM_HEADS, page=PAGE, key=GROUP.key, value=GROUP.value, device=torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """`count` equal chunks: `new` tokens after `cached` ones; where that is one, each decodes, at homes in turn."""

    cached: int
    new: int
    count: int = 1

    @property
    def chunks(self) -> list[StepChunk]:
        """For the step."""
        homes = [index % CP if self.new == 1 else None for index in range(self.count)]
        return [StepChunk(cached_tokens=self.cached, new_tokens=self.new, home=home) for home in homes]


def cases(totals: Sequence[int], *, batch: int) -> list[Case]:
    """A chunk that ends at each total for each share, and a batch that decodes there."""
    found = []
    for total in totals:
        news = dict.fromkeys(max(int(total * share), 1) for share in NEW_SHARES)
        found += [Case(cached=total - new, new=new) for new in news]
        found.append(Case(cached=total - 1, new=1, count=batch))
    return found


def policy(link: Link, *, forced: Strategy | None = None) -> ExchangePolicy:
    """The one that a CPU rank of the dense demo model has."""
    return exchange_policy(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        link=LINKS[link],
        forced=forced,
    )


#: Seconds of each run by case, link and strategy.
Samples = dict[tuple[Case, Link, Strategy], list[float]]


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """What LinkSpeed holds, measured: each a median over the runs on one rank."""

    bytes_per_s: float
    latency_s: float


def measure(groups: Mapping[Link, Communicator], *, wanted: Sequence[Case], runs: int) -> tuple[Samples, Any]:
    """One rank: all cases, and each link's figures."""
    samples: Samples = defaultdict(list)
    backends = {Link.GLOO: create_backend(SPEC, kind="torch"), Link.SHARED_MEMORY: _native()}
    with torch.inference_mode():
        for case in wanted:
            works = {
                (link, strategy): work
                for link, group in groups.items()
                for strategy, work in _works(case, group=group, link=link, backend=backends[link]).items()
            }
            for run in range(-1, runs):  # the first is not counted
                for (link, strategy), work in works.items():
                    seconds = timed(work, group=groups[link])
                    if run >= 0:
                        samples[case, link, strategy].append(seconds)
        return dict(samples), {link: link_figures(group, runs=5 * runs) for link, group in groups.items()}


def _native() -> AttentionBackend:
    return create_backend(SPEC, kind="native", library=load_native())


def _works(
    case: Case, *, group: Communicator, link: Link, backend: AttentionBackend
) -> dict[Strategy, Callable[[], object]]:
    """The layer's attention by each strategy, with memory that is random all over."""
    rows = exchange_rows(case.chunks, cp=CP, cp_rank=group.index, page_size=PAGE_SIZE)
    generator = torch.Generator().manual_seed(group.index)
    num_rows = rows.rows_of(group.index)
    q = torch.randn((num_rows, NUM_HEADS, HEAD_DIM), generator=generator)
    planes = tuple(torch.randn((2, num_rows, NUM_KV_HEADS, HEAD_DIM), generator=generator))
    num_pages = case.count * (-(-(case.cached + case.new) // PAGE_SIZE) + 1)
    layer = bind_layer(torch.zeros((num_pages, PAGE.page_bytes), dtype=torch.uint8), FORM)
    for plane in layer.planes:
        plane.copy_(torch.randn(plane.shape, generator=generator))

    def work(exchange: Exchange) -> object:
        return exchange.attend(q, planes, layer, with_lse=False)

    found: dict[Strategy, Callable[[], object]] = {}
    for strategy in REMOTE:
        member = CpMember(
            group=group, backend=backend, policy=policy(link, forced=strategy), device=torch.device("cpu")
        )
        found[strategy] = partial(work, plan_exchange(rows, member=member))
    return found


def timed(work: Callable[[], object], *, group: Communicator) -> float:
    """Seconds of `work`, begun by all ranks together."""
    group.all_gather(torch.zeros(1))
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def link_figures(group: Communicator, *, runs: int) -> LinkFigures:
    """A gather of one number, and of 2048 tokens' KV."""
    chunk = torch.randn((2048, 2, NUM_KV_HEADS, HEAD_DIM))
    latency_s, gather_s = (
        statistics.median(timed(lambda x=x: group.all_gather(x), group=group) for _ in range(runs))  # type: ignore[misc]
        for x in (torch.zeros(1), chunk)
    )
    return LinkFigures(bytes_per_s=chunk.nbytes * (CP - 1) / (gather_s - latency_s), latency_s=latency_s)


def slower(results: Sequence[tuple[Samples, Any]]) -> dict[tuple[Case, Link, Strategy], float]:
    """The slower rank's seconds a layer, medians over the runs."""
    (first, _), (second, _) = results
    return {key: statistics.median(map(max, values, second[key])) for key, values in first.items()}


def picked(case: Case, link: Link) -> Strategy:
    """What the chooser takes for each of the case's chunks."""
    return policy(link).cheapest(new_tokens=case.new, cached_tokens=case.cached, cp=CP, num_chunks=case.count)


def report(
    seconds: dict[tuple[Case, Link, Strategy], float], figures: Mapping[Link, LinkFigures], *, runs: int
) -> None:
    """The table and the plot."""
    page = Report(
        "exchange_strategies",
        title="Gathered KV, ring KV and passed queries over the share of new tokens",
        about=f"Attention and exchange of one layer, cp {CP}, one thread a rank; {NUM_HEADS} query and {NUM_KV_HEADS} "
        f"KV heads of {HEAD_DIM}, page size {PAGE_SIZE}; the slower rank's milliseconds, medians of {runs} interleaved "
        "runs. Over gloo attention is torch's, in shared memory the native one.",
        headings=("link", "chunks", *(strategy.value for strategy in REMOTE), "picked", "over fastest"),
    )
    found = list(dict.fromkeys((link, case) for case, link, _ in seconds))
    for link, case in sorted(found, key=lambda item: item[0].value):
        by_strategy = {strategy: seconds[case, link, strategy] for strategy in REMOTE}
        choice = picked(case, link)
        page.add(
            link.value,
            f"{case.count} × {case.new} after {case.cached}",
            *(f"{by_strategy[strategy] * 1e3:.2f}" for strategy in REMOTE),
            choice.value,
            f"{by_strategy[choice] / min(by_strategy.values()):.2f}",
        )
    for link, used in ((link, LINKS[link]) for link in figures):
        page.note(
            f"{link.value}: measured beside it, a gather has {figures[link].bytes_per_s / 1e9:.2f} GB/s and takes "
            f"{figures[link].latency_s * 1e6:.0f} µs at least; the chooser reckons with "
            f"{used.bytes_per_s / 1e9:.2f} GB/s, {used.latency_s * 1e6:.0f} µs a message and "
            f"{used.merge_bytes_per_s / 1e9:.2f} GB/s of partial outputs merged"
        )

    def plot(axes: Any) -> None:
        total = max(case.cached + case.new for _, case in found)
        shown = [case for link, case in found if link is Link.SHARED_MEMORY and case.cached + case.new == total]
        shown = [case for case in shown if case.count == 1]
        shares = [max(case.new / total, 1e-3) for case in shown]
        fastest = [min(seconds[case, Link.SHARED_MEMORY, strategy] for strategy in REMOTE) for case in shown]
        for strategy in REMOTE:
            over = [
                seconds[case, Link.SHARED_MEMORY, strategy] / best for case, best in zip(shown, fastest, strict=True)
            ]
            axes.plot(shares, over, marker="o", label=strategy.value)
        for share, case, best in zip(shares, shown, fastest, strict=True):
            picked_over = seconds[case, Link.SHARED_MEMORY, picked(case, Link.SHARED_MEMORY)] / best
            axes.plot(share, picked_over, marker="o", markersize=12, fillstyle="none", color="black")
        axes.set_xscale("log")
        axes.set_xlabel(f"share of new tokens of {total}, in shared memory (circled: what the chooser picks)")
        axes.set_ylabel("time over the fastest")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="cached and new tokens together")
    parser.add_argument("--batch", type=int, default=8, help="sequences that decode")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    results = run_ranks(CP, partial(measure, wanted=cases(options.tokens, batch=options.batch), runs=options.runs))
    report(slower(results), results[0][1], runs=options.runs)


if __name__ == "__main__":
    main()
