"""How long threads of a rank look for work before they sleep: decode on all cores, alone and beside other work.

Run: `python -m benchmarks.thread_waits` after `make demo-model`. One unified rank of the dense demo checkpoint for each
length of a wait; all are up at once and are measured in turn, alone and while as many processes as there are cores burn
them.
"""

import argparse
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from multiprocessing import get_context
from typing import Any

from benchmarks.bench import LivePools, running_bench
from benchmarks.pools import DENSE, cpu_share, greedy, interleaved, pool
from benchmarks.report import Report
from parallel.process.cores import available_cores
from parallel.settings import EngineSettings
from worker.launcher.rank_child import OPENMP_WAITS

VARIABLE = "GOMP_SPINCOUNT"
#: libgomp's own, where nothing is said.
DEFAULT = "300000"
ALONE, BESIDE = "alone", "beside others"
NEW_TOKENS = 32

#: Tokens/s and the share of time that the rank waited for a core, by length of the wait and by what was beside it.
Samples = dict[tuple[str, str], list[tuple[float, float]]]


def burn(parent: int) -> None:
    """Keeps a core busy until it is ended, or its parent has been."""
    while os.getppid() == parent:
        pass


@contextmanager
def burnt_cores(num_cores: int) -> Iterator[None]:
    """So many processes that want a core each."""
    burners = [get_context("spawn").Process(target=burn, args=(os.getpid(),)) for _ in range(num_cores)]
    for burner in burners:
        burner.start()
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.join()


def up(stack: ExitStack, spins: str) -> LivePools:
    """A rank on all cores whose threads look `spins` times."""
    os.environ[VARIABLE] = spins
    try:
        bench = stack.enter_context(running_bench(num_devices=1, model=str(DENSE), threads=available_cores()))
        engine = EngineSettings(prefix_cache=False, kv_tokens=4096)
        return stack.enter_context(bench.pools([pool("unified", engine)], model=str(DENSE)))
    finally:
        del os.environ[VARIABLE]


def run(waits: Sequence[str], *, runs: int) -> Samples:
    """Every length, alone and beside others, after an unmeasured generation each."""
    samples: Samples = defaultdict(list)
    seeds = count()
    with ExitStack() as stack:
        found = {spins: up(stack, spins) for spins in waits}

        def one(spins: str, beside: str) -> None:
            with cpu_share(found[spins].launcher_pid) as share:
                (generation,) = found[spins].generate([greedy(16, seed=next(seeds), new_tokens=NEW_TOKENS)])
            spent_s = generation.clock.last_token_s - generation.clock.first_token_s
            samples[spins, beside].append(((NEW_TOKENS - 1) / spent_s, share.longest_wait_s / spent_s))

        for pools in found.values():
            pools.generate([greedy(16, seed=next(seeds), new_tokens=4)])
        interleaved(waits, runs=runs, measure=lambda spins, _: one(spins, ALONE))
        with burnt_cores(available_cores()):
            interleaved(waits, runs=runs, measure=lambda spins, _: one(spins, BESIDE))
    return samples


def report(samples: Samples, waits: Sequence[str], *, runs: int) -> None:
    """The table and the plot."""
    page = Report(
        "thread_waits",
        title="How long the threads of a rank look for work before they sleep",
        about=f"One unified rank of the dense demo checkpoint on {available_cores()} threads, decode at batch 1, "
        f"tokens/s, medians of {runs} interleaved runs (best in brackets), by libgomp's {VARIABLE}: its own default is "
        f"{DEFAULT}, ranks are started with {OPENMP_WAITS[VARIABLE]}. Beside others: as many processes as there are "
        "cores burn them.",
        headings=(VARIABLE, ALONE, "over the default", BESIDE, "over the default", "waited alone", "waited beside"),
    )

    def median(spins: str, beside: str) -> float:
        return statistics.median(rate for rate, _ in samples[spins, beside])

    for spins in waits:
        cells = [spins]
        for beside in (ALONE, BESIDE):
            best = max(rate for rate, _ in samples[spins, beside])
            cells.append(f"{median(spins, beside):.1f} ({best:.1f})")
            cells.append(f"{median(spins, beside) / median(waits[0], beside):.2f}")
        shares = (statistics.median(share for _, share in samples[spins, beside]) for beside in (ALONE, BESIDE))
        page.add(*cells, *(f"{share:.0%}" for share in shares))
    page.note("waited: the share of time in which the rank's main thread could have run but other work had the cores")

    def plot(axes: Any) -> None:
        for beside in (ALONE, BESIDE):
            axes.plot(waits, [median(spins, beside) for spins in waits], marker="o", label=beside)
        axes.set_xlabel(VARIABLE)
        axes.set_ylabel("decode tokens/s")
        axes.legend()

    page.publish(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waits", nargs="+", default=[DEFAULT, "30000", "10000", "3000", "1000", "0"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    report(run(options.waits, runs=options.runs), options.waits, runs=options.runs)


if __name__ == "__main__":
    main()
