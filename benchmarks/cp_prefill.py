"""Context-parallel prefill: cp 2 over cp 1, one thread a rank, over the prompt's length, beside the ideal of 2.

Run: `python -m benchmarks.cp_prefill` after `make demo-model`. All layouts are up at once and are measured in turn.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import LivePools, running_bench
from benchmarks.pools import DENSE, cpu_share, greedy, interleaved, pool
from benchmarks.report import Report
from parallel.settings import EngineSettings

UNIFIED, CP1 = "unified", "cp 1"
MAX_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt: seconds to its first token, the leader's share of them in collectives, and what the ranks did."""

    prefill_s: float
    collective: float
    busiest_cpu_s: float
    longest_wait_s: float

    @property
    def unhindered_s(self) -> float:
        """Without the time in which a rank waited for a core; another rank's wait behind that one is still in it."""
        return self.prefill_s - self.longest_wait_s

    @property
    def waited(self) -> float:
        """The share of time in which a rank waited for a core."""
        return self.longest_wait_s / self.prefill_s


Samples = dict[tuple[str, int], list[Sample]]


@contextmanager
def layouts(exchanges: Sequence[str], *, chunk_tokens: int) -> Iterator[dict[str, LivePools]]:
    """The unified rank, a prefill pool of one rank, and one of two for each exchange: all up, by name."""
    with ExitStack() as stack:

        def up(name: str, *, cp: int, exchange: str) -> LivePools:
            bench = stack.enter_context(running_bench(num_devices=cp, model=str(DENSE)))
            engine = EngineSettings(
                prefix_cache=False,
                max_batch_tokens=chunk_tokens,
                max_sequences=2,
                kv_tokens=MAX_TOKENS + 256,
                exchange=exchange,
                step_timeout_s=600,
            )
            return stack.enter_context(bench.pools([pool(name, engine, cp=cp)], model=str(DENSE)))

        found = {UNIFIED: up("unified", cp=1, exchange="auto"), CP1: up("prefill", cp=1, exchange="auto")}
        yield found | {f"cp 2 {exchange}": up("prefill", cp=2, exchange=exchange) for exchange in exchanges}


def measure(pools: LivePools, *, tokens: int, seed: int) -> Sample:
    """Prefills one prompt that nobody has seen."""
    before = pools.load(pools.entry_pool)
    with cpu_share(pools.launcher_pid) as share:
        (generation,) = pools.generate([greedy(tokens, seed=seed)])
    after = pools.load(pools.entry_pool)
    return Sample(
        prefill_s=generation.clock.first_token_s,
        collective=(after.collective_s - before.collective_s) / (after.step_s - before.step_s),
        busiest_cpu_s=share.busiest_cpu_s,
        longest_wait_s=share.longest_wait_s,
    )


def run(lengths: Sequence[int], exchanges: Sequence[str], *, chunk_tokens: int, runs: int) -> Samples:
    """All layouts at all lengths, after one unmeasured prompt each."""
    samples: Samples = defaultdict(list)
    with layouts(exchanges, chunk_tokens=chunk_tokens) as found:
        for pools in found.values():
            measure(pools, tokens=256, seed=0)
        for tokens in lengths:

            def one(name: str, index: int, tokens: int = tokens) -> None:
                samples[name, tokens].append(measure(found[name], tokens=tokens, seed=1000 * tokens + index))

            interleaved(list(found), runs=runs, measure=one)
    return samples


def median(samples: Samples, name: str, tokens: int, *, of: str) -> float:
    """The median over the runs of one field of Sample."""
    values: list[float] = [getattr(sample, of) for sample in samples[name, tokens]]
    return statistics.median(values)


def ratio(samples: Samples, base: str, name: str, tokens: int, *, of: str) -> float:
    """How many times less `name` needs than `base`."""
    return median(samples, base, tokens, of=of) / median(samples, name, tokens, of=of)


def report(samples: Samples, *, chunk_tokens: int, runs: int) -> None:
    """The table and the plot."""
    lengths = sorted({tokens for _, tokens in samples})
    pairs = [name for name in dict.fromkeys(name for name, _ in samples) if name not in (UNIFIED, CP1)]
    page = Report(
        "cp_prefill",
        title="Context-parallel prefill: cp 2 over cp 1",
        about=f"One prompt at a time of the dense demo checkpoint, one thread a rank, chunks of {chunk_tokens} tokens, "
        f"page size 16; seconds from the request to the first token, medians of {runs} interleaved runs. Where other "
        "work had the cores (`waited`: the share of time in which a rank could have run but had none), the wall clock "
        "says little. *At least* takes that wait off both sides, though cp 2 still has in it what one rank waited for "
        "the other's wait; *at most* is the CPU time of cp 1 over that of cp 2's busier rank, as if nobody ever waited "
        "for anything.",
        headings=("tokens", "layout", "tokens/s", "of unified", "speed-up", "at least", "at most", "coll.", "waited"),
    )
    for tokens in lengths:
        for name in (UNIFIED, CP1, *pairs):
            page.add(
                str(tokens),
                name,
                f"{tokens / median(samples, name, tokens, of='prefill_s'):.0f}",
                f"{ratio(samples, UNIFIED, name, tokens, of='prefill_s'):.2f}",
                *(
                    f"{ratio(samples, CP1, name, tokens, of=field):.2f}"
                    for field in ("prefill_s", "unhindered_s", "busiest_cpu_s")
                ),
                f"{median(samples, name, tokens, of='collective'):.0%}",
                f"{median(samples, name, tokens, of='waited'):.0%}",
            )
    page.note("coll.: the share of the leader's step time inside collectives, waiting for the other rank included.")

    def plot(axes: Any) -> None:
        for name in pairs:
            for field, style in (("prefill_s", "-"), ("unhindered_s", ":")):
                ratios = [ratio(samples, CP1, name, tokens, of=field) for tokens in lengths]
                label = name if field == "prefill_s" else f"{name}, at least"
                axes.plot(lengths, ratios, marker="o", linestyle=style, label=label)
        axes.axhline(2, color="grey", linestyle="--", label="ideal")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(tokens) for tokens in lengths])
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel("prefill speed-up over cp 1")
        axes.set_ylim(0, 2.2)
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--exchanges", nargs="+", default=["auto"], choices=["auto", "gather", "ring", "pass_q"])
    parser.add_argument("--chunk-tokens", type=int, default=MAX_TOKENS, help="new tokens of a step")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    samples = run(options.tokens, options.exchanges, chunk_tokens=options.chunk_tokens, runs=options.runs)
    report(samples, chunk_tokens=options.chunk_tokens, runs=options.runs)


if __name__ == "__main__":
    main()
