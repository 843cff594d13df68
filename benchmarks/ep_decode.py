"""Expert-parallel decode: ep 2 over ep 1, one thread a rank, at batches of 1 to 64 of the MoE demo checkpoint.

Run: `python -m benchmarks.ep_decode` after `make demo-model`. Unified pools, so that only decode differs: ep 2 is two
attention dp coordinates whose rows meet in the experts. Both are up at once and are measured in turn.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import LivePools, running_bench
from benchmarks.pools import MOE, cpu_share, greedy, interleaved, pool
from benchmarks.report import Report
from parallel.settings import EngineSettings
from parallel.shape import ExpertSizes

EP1, EP2 = "ep 1", "ep 2"
PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch: tokens/s of decode and what the ranks did meanwhile, prefill of the short prompts included."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    collective: float
    waited: float


Samples = dict[tuple[str, int], list[Sample]]


@contextmanager
def layouts(dispatch: str, *, max_batch: int) -> Iterator[dict[str, LivePools]]:
    """Both layouts, up, by name."""
    with ExitStack() as stack:

        def up(ep: int) -> LivePools:
            bench = stack.enter_context(running_bench(num_devices=ep, model=str(MOE)))
            engine = EngineSettings(prefix_cache=False, max_sequences=max_batch, kv_tokens=8192, dispatch=dispatch)
            spec = pool("unified", engine, dp=ep, experts=ExpertSizes(ep=ep))
            return stack.enter_context(bench.pools([spec], model=str(MOE)))

        yield {EP1: up(1), EP2: up(2)}


def measure(pools: LivePools, *, batch: int, new_tokens: int, seed: int) -> Sample:
    """A batch sent at once; each sequence's rate is taken from its first token on, so that no prefill is in it."""
    before = pools.load("unified")
    with cpu_share(pools.launcher_pid) as share:
        generations = pools.generate(
            [greedy(PROMPT_TOKENS, seed=seed + index, new_tokens=new_tokens) for index in range(batch)]
        )
    after = pools.load("unified")
    clocks = [generation.clock for generation in generations]
    return Sample(
        tokens_per_s=sum((new_tokens - 1) / (clock.last_token_s - clock.first_token_s) for clock in clocks),
        tokens_per_cpu_s=batch * new_tokens / share.busiest_cpu_s,
        collective=(after.collective_s - before.collective_s) / (after.step_s - before.step_s),
        waited=share.longest_wait_s / max(clock.last_token_s for clock in clocks),
    )


def run(batches: Sequence[int], *, dispatch: str, new_tokens: int, runs: int) -> Samples:
    """Both layouts at all batches, after one unmeasured batch each."""
    samples: Samples = defaultdict(list)
    with layouts(dispatch, max_batch=max(batches)) as found:
        for pools in found.values():
            measure(pools, batch=max(batches), new_tokens=4, seed=0)
        for batch in batches:

            def one(name: str, index: int, batch: int = batch) -> None:
                seed = 1000 * (batch + 100 * index)
                samples[name, batch].append(measure(found[name], batch=batch, new_tokens=new_tokens, seed=seed))

            interleaved(list(found), runs=runs, measure=one)
    return samples


def median(samples: Samples, name: str, batch: int, *, of: str) -> float:
    """The median over the runs of one field of Sample."""
    values: list[float] = [getattr(sample, of) for sample in samples[name, batch]]
    return statistics.median(values)


def report(samples: Samples, *, dispatch: str, new_tokens: int, runs: int) -> None:
    """The table and the plot."""
    batches = sorted({batch for _, batch in samples})
    page = Report(
        "ep_decode",
        title="Expert-parallel decode: ep 2 over ep 1",
        about=f"The demo checkpoint of 8 experts, all of which every token visits; unified pools of one rank (ep 1) "
        f"and of two (attention dp 2, ep 2), one thread a rank, dispatch {dispatch}; prompts of {PROMPT_TOKENS} "
        f"tokens, {new_tokens} new ones each; tokens/s is the sum over the sequences of tokens after the first over "
        f"the time since the first, medians of {runs} interleaved runs. "
        "*By CPU* compares tokens a CPU second of the busier rank: as if nobody ever waited.",
        headings=("batch", "ep 1 tok/s", "ep 2 tok/s", "speed-up", "ideal", "by CPU", "coll.", "waited 1", "waited 2"),
    )
    for batch in batches:
        one, two = (median(samples, name, batch, of="tokens_per_s") for name in (EP1, EP2))
        cpu_one, cpu_two = (median(samples, name, batch, of="tokens_per_cpu_s") for name in (EP1, EP2))
        page.add(
            str(batch),
            f"{one:.1f}",
            f"{two:.1f}",
            f"{two / one:.2f}",
            "2.00",
            f"{cpu_two / cpu_one:.2f}",
            f"{median(samples, EP2, batch, of='collective'):.0%}",
            *(f"{median(samples, name, batch, of='waited'):.0%}" for name in (EP1, EP2)),
        )
    page.note("coll.: the share of the leader's step time inside collectives at ep 2, waiting for the other included")
    page.note("waited: the share of time in which a rank of ep 1, of ep 2 could have run but other work had the cores")
    page.note(
        "attention and output are whole on both ranks of ep 2: each reads 95 of the model's 135 million weights a "
        "step, so a step that is bound by reading them gains 1.42 at most, and one that is bound by rows 2"
    )
    page.note("at batch 1 one coordinate has the row, and both compute it in their half of each layer's experts")

    def plot(axes: Any) -> None:
        for of, label in (("tokens_per_s", "tokens/s"), ("tokens_per_cpu_s", "by CPU time")):
            ratios = [median(samples, EP2, batch, of=of) / median(samples, EP1, batch, of=of) for batch in batches]
            axes.plot(batches, ratios, marker="o", label=label)
        axes.axhline(2, color="grey", linestyle="--", label="ideal")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_ylim(0, 2.2)
        axes.set_xlabel("batch")
        axes.set_ylabel("decode speed-up of ep 2 over ep 1")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dispatch", choices=["auto", "gather", "all_to_all"], default="auto")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    samples = run(options.batches, dispatch=options.dispatch, new_tokens=options.new_tokens, runs=options.runs)
    report(samples, dispatch=options.dispatch, new_tokens=options.new_tokens, runs=options.runs)


if __name__ == "__main__":
    main()
