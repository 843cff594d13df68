"""What benchmarks of whole pools share: pools by their sizes, requests by their length, how long ranks waited."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ExpertSizes, ReplicaShape
from parallel.topology import PoolSpec
from proto import control_pb2
from router.generation import GenerationRequest

DENSE = Path(".cache/models/smollm2-135m-llama")
MOE = Path(".cache/models/smollm2-135m-mixtral")


def pool(
    name: str, engine: EngineSettings, *, pp: int = 1, dp: int = 1, cp: int = 1, experts: ExpertSizes | None = None
) -> PoolSpec:
    """One replica."""
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=cp), experts=experts)
    return PoolSpec(name=name, replicas=1, shape=shape, engine=engine)


def greedy(prompt_tokens: int, *, seed: int, new_tokens: int = 1) -> GenerationRequest:
    """A greedy request of random tokens that ends by its length."""
    prompt = np.random.default_rng(seed).integers(100, 40000, prompt_tokens)
    return GenerationRequest(
        prompt_ids=tuple(int(token) for token in prompt),
        max_new_tokens=new_tokens,
        stop_token_ids=frozenset(),
        sampling=control_pb2.Sampling(temperature=0, top_p=1),
    )


@dataclass(kw_only=True)
class CpuShare:
    """Of a measured span: the CPU seconds of the busiest rank, and the share of it that a rank waited for a core.

    Waiting is time in which a rank's main thread could have run but other processes had the cores: on a machine that
    is not idle it says how far a figure can be trusted.
    """

    busiest_cpu_s: float = 0.0
    longest_wait_s: float = 0.0


@contextlib.contextmanager
def cpu_share(launcher_pid: int) -> Iterator[CpuShare]:
    """Fills what it gives when the span ends."""
    share = CpuShare()
    ranks = [
        process.pid
        for process in psutil.Process(launcher_pid).children(recursive=True)
        if "worker.rank" in " ".join(process.cmdline())
    ]
    before = [_run_and_wait_s(pid) for pid in ranks]
    yield share
    after = [_run_and_wait_s(pid) for pid in ranks]
    spans = [(end[0] - start[0], end[1] - start[1]) for start, end in zip(before, after, strict=True)]
    share.busiest_cpu_s = max((run_s for run_s, _ in spans), default=0.0)
    share.longest_wait_s = max((wait_s for _, wait_s in spans), default=0.0)


def _run_and_wait_s(pid: int) -> tuple[float, float]:
    """Seconds that the main thread of `pid` has run, and has waited for a core; zeros where the system is silent."""
    try:
        run_ns, wait_ns, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    except OSError:
        return 0.0, 0.0
    return int(run_ns) / 1e9, int(wait_ns) / 1e9


def interleaved(contenders: Sequence[str], *, runs: int, measure: Callable[[str, int], None]) -> None:
    """Calls `measure(contender, run)` for all contenders of a run before the next run: all see the same noise."""
    for run in range(runs):
        for contender in contenders:
            measure(contender, run)
