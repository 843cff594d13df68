"""What drawing a step's tokens costs: torch's kernels beside those in C++.

Run: `python -m benchmarks.sampling`. Both draw from the same logits on one thread, in turn, and must give the same
tokens. The logits are of a normal distribution with a deviation of `LOGITS_DEVIATION`: flatter than a model's, which
keeps more tokens in top-p.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.report import Report
from native.build import Build
from native.library import NativeLibrary
from proto import control_pb2
from worker.kernels.interface import Draw, Kernels
from worker.kernels.native_kernels import NativeKernels
from worker.kernels.torch_kernels import TorchKernels

VOCAB_SIZE = 49152
NUM_ROWS = (1, 8, 32)
TEMPERATURE = 0.8
LOGITS_DEVIATION = 2.0
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
}


def draws(name: str, *, num_rows: int) -> list[Draw]:
    """One for each row, each with a seed of its own."""
    values: dict[str, Any] = {"temperature": TEMPERATURE, "top_p": 1.0, **SAMPLINGS[name]}
    return [Draw(sampling=control_pb2.Sampling(**values, seed=row), position=100 + row) for row in range(num_rows)]


def milliseconds(kinds: Sequence[Kernels], logits_SV: torch.Tensor, asked: Sequence[Draw], *, runs: int) -> list[float]:
    """The median of each kind's calls, which take turns."""
    times: list[list[float]] = [[] for _ in kinds]
    for _ in range(runs):
        tokens = []
        for kind, own in zip(kinds, times, strict=True):
            started = time.perf_counter()
            tokens.append(kind.draw(logits_SV, asked)[0])
            own.append(time.perf_counter() - started)
        assert all(torch.equal(each, tokens[0]) for each in tokens)
    return [1000 * statistics.median(own) for own in times]


def report(*, runs: int) -> None:
    """The table."""
    page = Report(
        "sampling",
        title="What drawing tokens costs",
        about=f"Milliseconds of one call over rows of {VOCAB_SIZE} logits (normal, deviation {LOGITS_DEVIATION:g}), "
        f"medians of {runs}, on one thread; temperature {TEMPERATURE} where it is not greedy. Both gave the same "
        "tokens.",
        headings=("how", "rows", "torch", "native", "times as fast"),
    )
    kinds = (TorchKernels(), NativeKernels(NativeLibrary(Build().make())))
    ratios: dict[str, list[float]] = {name: [] for name in SAMPLINGS}
    for name in SAMPLINGS:
        for num_rows in NUM_ROWS:
            logits = LOGITS_DEVIATION * torch.randn(
                num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(num_rows)
            )
            plain, native = milliseconds(kinds, logits, draws(name, num_rows=num_rows), runs=runs)
            ratios[name].append(plain / native)
            page.add(name, str(num_rows), f"{plain:.3f}", f"{native:.3f}", f"{plain / native:.1f}")
    page.publish(lambda axes: _plot(axes, ratios))


def _plot(axes: Any, ratios: dict[str, list[float]]) -> None:
    for name, values in ratios.items():
        axes.plot(NUM_ROWS, values, marker="o", label=name)
    axes.set_xlabel("rows")
    axes.set_ylabel("times as fast as torch")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report(runs=arguments.runs)


if __name__ == "__main__":
    main()
