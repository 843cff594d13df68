"""Threads of ranks where a prefill and a decode pool share the cores: by the ranks of both, or of the larger alone.

Run: `python -m benchmarks.pool_threads` after `make demo-model`. One prefill and one decode rank of the dense demo
checkpoint; both kinds are up at once and are measured in turn.
"""

import argparse
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

from benchmarks.bench import LivePools, running_bench
from benchmarks.pools import DENSE, cpu_share, greedy, interleaved, pool
from benchmarks.report import Report
from parallel.process.cores import available_cores
from parallel.settings import EngineSettings

BOTH, LARGER = "over both", "over the larger"
PROMPT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that are sent at once: with one, a pool rests while the other works."""

    requests: int
    new_tokens: int


LOADS = {
    "one request": Load(requests=1, new_tokens=64),
    "8 at once": Load(requests=8, new_tokens=64),
    "16 at once": Load(requests=16, new_tokens=32),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One load: output tokens/s from the first request to the last token, and the longest wait for a core."""

    tokens_per_s: float
    first_token_s: float
    waited: float


Samples = dict[tuple[str, str], list[Sample]]


def measure(pools: LivePools, load: Load, *, seed: int) -> Sample:
    """All requests of `load` at once, each of a prompt of its own."""
    requests = [greedy(PROMPT_TOKENS, seed=seed + index, new_tokens=load.new_tokens) for index in range(load.requests)]
    started = time.perf_counter()
    with cpu_share(pools.launcher_pid) as share:
        generations = pools.generate(requests)
    spent_s = time.perf_counter() - started
    return Sample(
        tokens_per_s=load.requests * load.new_tokens / spent_s,
        first_token_s=statistics.median(generation.clock.first_token_s for generation in generations),
        waited=share.longest_wait_s / spent_s,
    )


def run(*, runs: int) -> Samples:
    """Both kinds under every load, after an unmeasured one each."""
    samples: Samples = defaultdict(list)
    cores, seeds = available_cores(), count(step=100)
    with ExitStack() as stack:

        def up(threads: int) -> LivePools:
            bench = stack.enter_context(running_bench(num_devices=2, model=str(DENSE), threads=threads))
            engine = EngineSettings(prefix_cache=False, kv_tokens=24 * 1024)
            return stack.enter_context(bench.pools([pool("prefill", engine), pool("decode", engine)], model=str(DENSE)))

        found = {BOTH: up(max(cores // 2, 1)), LARGER: up(cores)}
        for pools in found.values():
            measure(pools, Load(requests=4, new_tokens=4), seed=next(seeds))
        for label, load in LOADS.items():

            def one(name: str, index: int, label: str = label, load: Load = load) -> None:
                samples[name, label].append(measure(found[name], load, seed=next(seeds)))

            interleaved(list(found), runs=runs, measure=one)
    return samples


def report(samples: Samples, *, runs: int) -> None:
    """The table and the plot."""
    cores = available_cores()
    page = Report(
        "pool_threads",
        title="Threads where two pools share a host",
        about=f"One prefill and one decode rank of the dense demo checkpoint on {cores} cores: each with the cores "
        "over the ranks of both pools, or with all of them, as if only one pool were busy at a time. Prompts of "
        f"{PROMPT_TOKENS} tokens; output tokens/s from the first request to the last token, medians of {runs} "
        "interleaved runs.",
        headings=("load", "over both, tok/s", "over the larger", "ratio", "first token ratio", "waited", "waited"),
    )

    def median(name: str, label: str, of: str) -> float:
        values: list[float] = [getattr(sample, of) for sample in samples[name, label]]
        return statistics.median(values)

    ratios = {label: median(LARGER, label, "tokens_per_s") / median(BOTH, label, "tokens_per_s") for label in LOADS}
    for label in LOADS:
        page.add(
            label,
            *(f"{median(name, label, 'tokens_per_s'):.1f}" for name in (BOTH, LARGER)),
            f"{ratios[label]:.2f}",
            f"{median(LARGER, label, 'first_token_s') / median(BOTH, label, 'first_token_s'):.2f}",
            *(f"{median(name, label, 'waited'):.0%}" for name in (BOTH, LARGER)),
        )
    page.note("first token ratio: of the median seconds to a request's first token; below 1 the larger share is faster")
    page.note("waited: the share of time in which a rank's main thread could have run but others had the cores")

    def plot(axes: Any) -> None:
        axes.bar(list(ratios), list(ratios.values()))
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylabel("output tokens/s, over the larger / over both")

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    report(run(runs=options.runs), runs=options.runs)


if __name__ == "__main__":
    main()
