"""The hand-off of KV from prefill to decode: its rate against a plain copy of as many bytes, and how much is hidden.

Run: `python -m benchmarks.handoff` after `make demo-model`. The KV of the dense demo checkpoint goes layer by layer
while prefill runs; what is left after the first token is what a client waits for.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bench import LivePools, running_bench
from benchmarks.pools import DENSE, cpu_share, greedy, pool
from benchmarks.report import Report
from parallel.settings import EngineSettings


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence: its bytes, the seconds in which they were written, and those between first token and their end."""

    num_bytes: int
    write_s: float
    exposed_s: float
    prefill_s: float
    copy_s: float
    waited: float

    @property
    def hidden(self) -> float:
        """The share of the writing that prefill had not to be waited for."""
        return max(1 - self.exposed_s / self.write_s, 0.0)

    @property
    def over_copy(self) -> float:
        """The rate of the hand-off over that of the copy."""
        return self.copy_s / self.write_s


@contextmanager
def pools(prefill_cp: int, *, max_tokens: int) -> Iterator[LivePools]:
    """Prefill on `prefill_cp` ranks and decode on one."""
    engine = EngineSettings(prefix_cache=False, kv_tokens=max_tokens + 256, max_sequences=2, step_timeout_s=600)
    specs = [pool("prefill", engine, cp=prefill_cp), pool("decode", engine)]
    with (
        running_bench(num_devices=prefill_cp + 1, model=str(DENSE)) as bench,
        bench.pools(specs, model=str(DENSE)) as up,
    ):
        yield up


def measure(up: LivePools, *, tokens: int, seed: int) -> Sample:
    """One prompt, two new tokens, and a copy of its KV's bytes just after it."""
    with cpu_share(up.launcher_pid) as share:
        (generation,) = up.generate([greedy(tokens, seed=seed, new_tokens=2)])
    clock = generation.clock
    return Sample(
        num_bytes=generation.handoff_bytes,
        write_s=generation.handoff_write_s,
        exposed_s=max(clock.handed_off_s - clock.first_token_s, 0.0),
        prefill_s=clock.first_token_s - clock.admitted_s,
        copy_s=copy_s(generation.handoff_bytes),
        waited=share.longest_wait_s / clock.first_token_s,
    )


def copy_s(num_bytes: int) -> float:
    """Seconds of one plain copy in this process on one thread, between buffers whose pages are mapped."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)


def run(lengths: Sequence[int], *, prefill_cp: int, runs: int) -> dict[int, list[Sample]]:
    """All lengths in turn in each run, after one unmeasured prompt."""
    samples: dict[int, list[Sample]] = defaultdict(list)
    with pools(prefill_cp, max_tokens=max(lengths)) as up:
        measure(up, tokens=256, seed=0)
        for index in range(runs):
            for tokens in lengths:
                samples[tokens].append(measure(up, tokens=tokens, seed=1000 * tokens + index))
    return samples


def report(samples: dict[int, list[Sample]], *, prefill_cp: int, runs: int) -> None:
    """The table and the plot."""

    def median(tokens: int, of: Callable[[Sample], float]) -> float:
        return statistics.median(of(sample) for sample in samples[tokens])

    page = Report(
        "handoff",
        title="The hand-off of KV from prefill to decode",
        about=f"One prompt at a time of the dense demo checkpoint from a prefill pool of cp {prefill_cp} to one decode "
        f"rank, one thread a rank, chunks of 2048 tokens, float32 KV through NIXL; medians of {runs} interleaved runs. "
        "`write` is the time in which writes were under way on the rank that wrote longest, while the model computes "
        "on the same cores; `copy` is one `Tensor.copy_` of as many bytes on one thread, made just after. `exposed` "
        "runs from the first token to the end of the last write, as the router sees both; hidden is 1 - exposed / "
        "write.",
        headings=(
            "prompt",
            "MB",
            "prefill s",
            "write ms",
            "GB/s",
            "copy GB/s",
            "of copy",
            "exposed ms",
            "hidden",
            "waited",
        ),
    )
    lengths = sorted(samples)
    for tokens in lengths:
        page.add(
            str(tokens),
            f"{median(tokens, lambda sample: sample.num_bytes / 1e6):.1f}",
            f"{median(tokens, lambda sample: sample.prefill_s):.2f}",
            f"{median(tokens, lambda sample: sample.write_s * 1e3):.1f}",
            f"{median(tokens, lambda sample: sample.num_bytes / sample.write_s / 1e9):.2f}",
            f"{median(tokens, lambda sample: sample.num_bytes / sample.copy_s / 1e9):.2f}",
            f"{median(tokens, lambda sample: sample.over_copy):.2f}",
            f"{median(tokens, lambda sample: sample.exposed_s * 1e3):.1f}",
            f"{median(tokens, lambda sample: sample.hidden):.0%}",
            f"{median(tokens, lambda sample: sample.waited):.0%}",
        )
    page.note("waited: the share of time in which a rank could have run but other work had the cores")

    def plot(axes: Any) -> None:
        axes.plot(lengths, [median(tokens, lambda s: s.hidden) for tokens in lengths], marker="o", label="hidden")
        axes.plot(
            lengths, [median(tokens, lambda s: s.over_copy) for tokens in lengths], marker="o", label="rate of a copy's"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(tokens) for tokens in lengths])
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel("share")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--prefill-cp", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    samples = run(options.tokens, prefill_cp=options.prefill_cp, runs=options.runs)
    report(samples, prefill_cp=options.prefill_cp, runs=options.runs)


if __name__ == "__main__":
    main()
