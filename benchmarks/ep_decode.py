"""Expert-parallel decode: ep 2 over ep 1, at batches of 1 to 64 of the MoE demo checkpoint.

Run: `python -m benchmarks.ep_decode` after `make demo-model`. Unified pools, so that only decode differs: ep 2 is two
attention dp coordinates of one thread each, whose rows meet in the experts; ep 1 has one thread, or both. All are up at
once and are measured in turn.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import LivePools, running_bench
from benchmarks.machine_rates import MachineRates, Rates
from benchmarks.pools import MOE, cpu_share, greedy, interleaved, pool
from benchmarks.report import Report
from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.stage_cost import stage_costs

EP1, EP1_BOTH, EP2 = "ep 1", "ep 1, both cores", "ep 2"
#: As the checkpoint stores them.
WEIGHTS = "bfloat16"
PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One batch: tokens/s of decode and what the ranks did meanwhile, prefill of the short prompts included."""

    tokens_per_s: float
    collective: float
    waited: float


Samples = dict[tuple[str, int], list[Sample]]


@contextmanager
def layouts(dispatch: str, *, max_batch: int) -> Iterator[dict[str, LivePools]]:
    """Both layouts, up, by name."""
    with ExitStack() as stack:

        def up(ep: int, *, threads: int = 1) -> LivePools:
            bench = stack.enter_context(running_bench(num_devices=ep, model=str(MOE), threads=threads))
            engine = EngineSettings(
                prefix_cache=False, max_sequences=max_batch, kv_tokens=8192, dispatch=dispatch, weights=WEIGHTS
            )
            spec = pool("unified", engine, dp=ep, experts=ExpertSizes(ep=ep))
            return stack.enter_context(bench.pools([spec], model=str(MOE)))

        yield {EP1: up(1), EP1_BOTH: up(1, threads=2), EP2: up(2)}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a step takes at least: to read its weights, or to compute, with the rates of one core and of both."""

    one: Rates
    both: Rates

    def step_s(self, name: str, *, batch: int) -> float:
        """Seconds, if nothing but that cost any."""
        ranks = 2 if name == EP2 else 1
        sizes = AttentionSizes(dp=ranks)
        shape = ReplicaShape(attention=sizes, experts=ExpertSizes(ep=ranks), shares_output=ranks > 1)
        (cost,) = stage_costs(describe_checkpoint(MOE), shape=shape, settings=EngineSettings(weights=WEIGHTS))
        rows, rates = -(-batch // ranks), self.one if name == EP1 else self.both
        return max(cost.read_bytes(rows) * ranks / rates.read_bytes, cost.flops(rows) * ranks / rates.flops)

    def speed_up(self, of: str, over: str, *, batch: int) -> float:
        """At most."""
        return self.step_s(over, batch=batch) / self.step_s(of, batch=batch)


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
        collective=(after.collective_s - before.collective_s) / (after.step_s - before.step_s),
        waited=share.longest_wait_s / max(clock.last_token_s for clock in clocks),
    )


def run(batches: Sequence[int], *, dispatch: str, new_tokens: int, runs: int) -> tuple[Samples, dict[int, Bounds]]:
    """All layouts at all batches, after one unmeasured batch each, and the bounds of the same minutes."""
    samples: Samples = defaultdict(list)
    bounds, rates = {}, MachineRates()
    with layouts(dispatch, max_batch=max(batches)) as found:
        for pools in found.values():
            measure(pools, batch=max(batches), new_tokens=4, seed=0)
        for batch in batches:

            def one(name: str, index: int, batch: int = batch) -> None:
                seed = 1000 * (batch + 100 * index)
                samples[name, batch].append(measure(found[name], batch=batch, new_tokens=new_tokens, seed=seed))

            bounds[batch] = Bounds(one=rates.measure(threads=1), both=rates.measure(threads=2))
            interleaved(list(found), runs=runs, measure=one)
    return samples, bounds


def median(samples: Samples, name: str, batch: int, *, of: str) -> float:
    """The median over the runs of one field of Sample."""
    values: list[float] = [getattr(sample, of) for sample in samples[name, batch]]
    return statistics.median(values)


def report(samples: Samples, bounds: Mapping[int, Bounds], *, dispatch: str, new_tokens: int, runs: int) -> None:
    """The table and the plot."""
    batches = sorted({batch for _, batch in samples})
    page = Report(
        "ep_decode",
        title="Expert-parallel decode: ep 2 over ep 1",
        about=f"The demo checkpoint of 8 experts, all of which every token visits, held in {WEIGHTS}; unified pools of "
        f"one rank (ep 1, with one thread, or with two: *both cores*) and of two of one thread (attention dp 2, ep 2), "
        f"dispatch {dispatch}; prompts of {PROMPT_TOKENS} tokens, {new_tokens} new ones each; tokens/s is the sum over "
        f"the sequences of tokens after the first over the time since the first, medians of {runs} interleaved runs.",
        headings=("batch", "ep 1", "ep 1, both", "ep 2", "over ep 1", "bound", "over both", "bound", "coll.", "waited"),
    )
    for batch in batches:
        one, both, two = (median(samples, name, batch, of="tokens_per_s") for name in (EP1, EP1_BOTH, EP2))
        page.add(
            str(batch),
            *(f"{rate:.1f}" for rate in (one, both, two)),
            f"{two / one:.2f}",
            f"{bounds[batch].speed_up(EP2, EP1, batch=batch):.2f}",
            f"{two / both:.2f}",
            f"{bounds[batch].speed_up(EP2, EP1_BOTH, batch=batch):.2f}",
            f"{median(samples, EP2, batch, of='collective'):.0%}",
            f"{median(samples, EP2, batch, of='waited'):.0%}",
        )
    first = bounds[batches[0]]
    page.note(
        "bound: of a step that only reads its weights or only computes, whichever takes longer, at the rates that a "
        f"product had in the same minutes (at batch {batches[0]} one core {first.one.read_bytes / 1e9:.0f} GB/s and "
        f"{first.one.flops / 1e9:.0f} GFLOP/s, both {first.both.read_bytes / 1e9:.0f} and {first.both.flops / 1e9:.0f})"
    )
    page.note("attention is whole on both ranks of ep 2, experts and the output's vocabulary are halved")
    page.note("coll.: the share of the leader's step time inside collectives at ep 2, waiting for the other included")
    page.note("waited: the share of time in which a rank of ep 2 could have run but other work had the cores")
    page.note("at batch 1 one coordinate has the row, and both compute it in their half of experts and output")

    def plot(axes: Any) -> None:
        for over, label in ((EP1, "ep 1"), (EP1_BOTH, "ep 1 on both cores")):
            rates = {
                name: [median(samples, name, batch, of="tokens_per_s") for batch in batches] for name in (EP2, over)
            }
            ratios = [two / one for two, one in zip(rates[EP2], rates[over], strict=True)]
            (line,) = axes.plot(batches, ratios, marker="o", label=f"over {label}")
            most = [bounds[batch].speed_up(EP2, over, batch=batch) for batch in batches]
            axes.plot(batches, most, linestyle="--", color=line.get_color(), label="its bound")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_ylim(0, 2.2)
        axes.set_xlabel("batch")
        axes.set_ylabel("tokens/s of ep 2 over another's")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dispatch", choices=["auto", "gather", "all_to_all"], default="auto")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    samples, bounds = run(options.batches, dispatch=options.dispatch, new_tokens=options.new_tokens, runs=options.runs)
    report(samples, bounds, dispatch=options.dispatch, new_tokens=options.new_tokens, runs=options.runs)


if __name__ == "__main__":
    main()
