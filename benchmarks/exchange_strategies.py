"""The three exchanges against each other over the share of cached tokens, and what the chooser picks.

Run: `python -m benchmarks.exchange_strategies`. Two processes of one thread each, a real gloo group between them, one
layer of the dense demo model's sizes over random KV; no checkpoint is needed.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore

from attention.exchange.choice import REMOTE, ExchangePolicy, Strategy
from attention.exchange.member import CpMember
from attention.exchange.plan import Exchange, plan_exchange
from attention.interface import AttentionSpec
from attention.layer_memory import LayerFormat, bind_layer
from attention.select import create_backend
from attention.torch_kernel.dense import attend
from benchmarks.exchange_steps import StepChunk, cache_group, exchange_policy, exchange_rows
from benchmarks.report import Report
from parallel.collectives.communicator import CollectiveClock, Communicator
from parallel.collectives.groups import Rendezvous, build_groups
from parallel.link import LINKS
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import lay_out_page

CP = 2
PAGE_SIZE = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
#: New tokens over all tokens, and a decode step's one token as 0.
NEW_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.06, 0.03, 0.01, 0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One chunk: `new` tokens after `cached` ones."""

    cached: int
    new: int


def cases(total: int) -> list[Case]:
    """A chunk that ends at `total` for each share."""
    return [Case(cached=total - new, new=new) for new in (max(int(total * share), 1) for share in NEW_SHARES)]


def policy(forced: Strategy | None) -> ExchangePolicy:
    """The one that a CPU rank of the dense demo model has."""
    return exchange_policy(
        num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE_SIZE, forced=forced
    )


def rank_main(rank: int, folder: str, total: int, runs: int, results: Any) -> None:
    """One process: seconds of each (case, strategy, run), put to `results` as one list."""
    torch.set_num_threads(1)
    shape = ReplicaShape(attention=AttentionSizes(cp=CP), experts=None)
    group = build_groups(
        shape,
        global_rank=rank,
        order=shape.creation_order_of(rank),
        rendezvous=Rendezvous(
            store=FileStore(f"{folder}/store", CP),
            device=torch.device("cpu"),
            host_address="127.0.0.1",
            build_timeout_s=60,
            timeout_s=60,
        ),
        clock=CollectiveClock(),
    )["attn_cp"]
    with torch.inference_mode():
        found = [seconds for case in cases(total) for seconds in measure_case(case, group=group, runs=runs)]
        results.put((rank, found, link_figures(total, group=group, runs=runs)))


def measure_case(case: Case, *, group: Communicator, runs: int) -> list[tuple[Case, Strategy, float]]:
    """The strategies in turn in each run, the first run not counted."""
    device = torch.device("cpu")
    backend = create_backend(spec())
    rows = exchange_rows(
        [StepChunk(cached_tokens=case.cached, new_tokens=case.new)],
        cp=CP,
        cp_rank=group.index,
        page_size=PAGE_SIZE,
    )
    generator = torch.Generator().manual_seed(group.index)
    num_rows, num_pages = rows.rows_of(group.index), int(rows.seen[-1, group.index])
    q = torch.randn((num_rows, NUM_HEADS, HEAD_DIM), generator=generator)
    planes = torch.randn((2, num_rows, NUM_KV_HEADS, HEAD_DIM), generator=generator)
    layer = bind_layer(torch.zeros((num_pages, spec().page.page_bytes), dtype=torch.uint8), FORM)
    for plane in layer.planes:
        plane.copy_(torch.randn(plane.shape, generator=generator))
    exchanges = {
        strategy: plan_exchange(
            rows, member=CpMember(group=group, backend=backend, policy=policy(strategy), device=device)
        )
        for strategy in REMOTE
    }
    found = []
    for run in range(-1, runs):
        for strategy, exchange in exchanges.items():

            def work(exchange: Exchange = exchange) -> None:
                exchange.attend(q, tuple(planes), layer, with_lse=False)

            seconds = timed(work, group=group)
            if run >= 0:
                found.append((case, strategy, seconds))
    return found


GROUP = cache_group(num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM)
PAGE = lay_out_page(GROUP.planes, page_size=PAGE_SIZE, num_heads=NUM_KV_HEADS, dtype="float32")
FORM = LayerFormat(page=PAGE, key=GROUP.key, value=GROUP.value, scale=HEAD_DIM**-0.5)


def spec() -> AttentionSpec:
    """The dense demo model's heads."""
    return AttentionSpec(num_heads=NUM_HEADS, page=PAGE, key=GROUP.key, value=GROUP.value, device=torch.device("cpu"))


def timed(work: Callable[[], object], *, group: Communicator) -> float:
    """Seconds of `work`, begun by all ranks together."""
    group.all_gather(torch.zeros(1))
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """What LinkSpeed holds, measured: each a median over the runs on one rank."""

    flops: float
    bytes_per_s: float
    latency_s: float


def link_figures(total: int, *, group: Communicator, runs: int) -> LinkFigures:
    """Attention's operations on this rank's own pages, a gather of half the KV, and a gather of one number."""
    rows = total // 4
    chunk = torch.randn((total // CP, 2, NUM_KV_HEADS, HEAD_DIM))
    k, v = (part.transpose(0, 1).contiguous() for part in chunk.unbind(1))
    q = torch.randn((NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, rows, HEAD_DIM))
    attend_s = _median(lambda: attend(q, k, v, scale=0.1, causal=False), group=group, runs=runs)
    latency_s = _median(lambda: group.all_gather(torch.zeros(1)), group=group, runs=5 * runs)
    gather_s = _median(lambda: group.all_gather(chunk), group=group, runs=runs)
    return LinkFigures(
        flops=4 * rows * (total // CP) * NUM_HEADS * HEAD_DIM / attend_s,
        bytes_per_s=chunk.nbytes * (CP - 1) / (gather_s - latency_s),
        latency_s=latency_s,
    )


def _median(work: Callable[[], object], *, group: Communicator, runs: int) -> float:
    return statistics.median(timed(work, group=group) for _ in range(runs))


def run(total: int, *, runs: int) -> tuple[dict[tuple[Case, Strategy], float], LinkFigures]:
    """The slower rank's seconds a layer, medians over the runs, and the link's figures on rank 0."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank_main, args=(rank, folder, total, runs, results)) for rank in range(CP)]
        for rank in ranks:
            rank.start()
        (_, first, link), (_, second, _) = sorted((results.get() for _ in ranks), key=lambda found: found[0])
        for rank in ranks:
            rank.join()
    by_case: dict[tuple[Case, Strategy], list[float]] = defaultdict(list)
    for (case, strategy, seconds), (_, _, other) in zip(first, second, strict=True):
        by_case[case, strategy].append(max(seconds, other))
    return {key: statistics.median(values) for key, values in by_case.items()}, link


def report(seconds: dict[tuple[Case, Strategy], float], link: LinkFigures, *, total: int, runs: int) -> None:
    """The table and the plot."""
    page = Report(
        "exchange_strategies",
        title="Gathered KV, ring KV and passed queries over the share of new tokens",
        about=f"Attention and exchange of one layer, one chunk that ends at position {total}, cp {CP}, one thread a "
        f"rank over gloo; {NUM_HEADS} query and {NUM_KV_HEADS} KV heads of {HEAD_DIM}, page size {PAGE_SIZE}; the "
        f"slower rank's milliseconds, medians of {runs} interleaved runs.",
        headings=("cached", "new", "new share", *(strategy.value for strategy in REMOTE), "picked", "over fastest"),
    )
    for case in cases(total):
        by_strategy = {strategy: seconds[case, strategy] for strategy in REMOTE}
        picked = policy(None).cheapest(new_tokens=case.new, cached_tokens=case.cached, cp=CP)
        page.add(
            str(case.cached),
            str(case.new),
            f"{case.new / total:.1%}",
            *(f"{by_strategy[strategy] * 1e3:.2f}" for strategy in REMOTE),
            picked.value,
            f"{by_strategy[picked] / min(by_strategy.values()):.2f}",
        )
    used = LINKS["cpu"]
    page.note(
        f"measured beside it: attention {link.flops / 1e9:.0f} GFLOP/s on one core, gather "
        f"{link.bytes_per_s / 1e9:.2f} GB/s, {link.latency_s * 1e3:.2f} ms a message"
    )
    page.note(
        f"the chooser reckons with {used.flops / 1e9:.0f} GFLOP/s, {used.bytes_per_s / 1e9:.2f} GB/s, "
        f"{used.latency_s * 1e3:.2f} ms and {used.merge_bytes_per_s / 1e9:.2f} GB/s of partial outputs merged, and "
        f"that attention hides {used.hidden:.0%} of a transfer"
    )

    def plot(axes: Any) -> None:
        shares = [max(case.new / total, 1e-3) for case in cases(total)]
        fastest = [min(seconds[case, strategy] for strategy in REMOTE) for case in cases(total)]
        for strategy in REMOTE:
            over = [seconds[case, strategy] / best for case, best in zip(cases(total), fastest, strict=True)]
            axes.plot(shares, over, marker="o", label=strategy.value)
        for share, case, best in zip(shares, cases(total), fastest, strict=True):
            picked = policy(None).cheapest(new_tokens=case.new, cached_tokens=case.cached, cp=CP)
            axes.plot(share, seconds[case, picked] / best, marker="o", markersize=12, fillstyle="none", color="black")
        axes.set_xscale("log")
        axes.set_xlabel("share of new tokens (circled: what the chooser picks)")
        axes.set_ylabel("time over the fastest")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="cached and new tokens together")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    seconds, link = run(options.tokens, runs=options.runs)
    report(seconds, link, total=options.tokens, runs=options.runs)


if __name__ == "__main__":
    main()
