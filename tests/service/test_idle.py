"""A rank that waits burns no core: for requests, and for another rank that is slow."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from parallel.cores import RankCores
from tests.harness.checkpoints import Oracle
from tests.harness.epochs import PROMPT, Replica, assign, running_launcher
from tests.harness.process_usage import cpu_s
from tests.harness.router_process import descendants, rank_pids
from tests.harness.running_router import greedy, running_router, topology

#: Of a core. What spins has all of one; the hand-off's progress thread of a decode rank takes a few hundredths.
MOST_BUSY = 0.2
STRETCH_S = 2.0


def busy_shares(pids: Sequence[int]) -> dict[int, float]:
    """The share of a core that each process uses over a stretch of time."""
    time.sleep(0.5)  # OpenMP's threads still look for work for some milliseconds
    started, before = time.monotonic(), [cpu_s(pid) for pid in pids]
    time.sleep(STRETCH_S)
    spent_s = time.monotonic() - started
    return {pid: (cpu_s(pid) - used_s) / spent_s for pid, used_s in zip(pids, before, strict=True)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize(
    "pools",
    [
        {
            "prefill": {"attention": {"cp": 2}, "experts": {"ep": 2}},
            "decode": {"attention": {"dp": 2}, "experts": {"ep": 2}},
        },
        {"unified": {"pp": 2, "attention": {"tp": 2}, "experts": {"ep": 2}}},
    ],
    ids=["two pools", "pipeline"],
)
def test_nothing_burns_while_nobody_asks(
    pools: dict[str, object], kernels: str, mixtral: Oracle, tmp_path: Path
) -> None:
    content = topology(mixtral.folder, pools=pools, devices=4, engine={"kernels": kernels, "threads": 2})
    with running_router(content, tmp_path) as router:
        router.generate_all([greedy(PROMPT, max_new_tokens=8)] * 4)
        router.wait_until_empty()
        (launcher,) = router.server.cluster.launcher_pids
        assert len(rank_pids(launcher)) == 4
        shares = busy_shares([launcher, *descendants(launcher)])
    assert max(shares.values()) < MOST_BUSY, shares


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_rank_that_waits_for_a_slow_one_burns_nothing_and_goes_on(kernels: str, mixtral: Oracle) -> None:
    """In a collective, in shared memory or gloo's, in the middle of a step."""
    wanted = list(mixtral.answer(PROMPT, 64).token_ids[:64])
    with running_launcher(mixtral) as (stub, ports, command):
        spinning = dict.fromkeys(range(2), RankCores(spins=True))
        assign(stub, ports, mixtral, epoch=1, dp=2, kernels=kernels, cores=spinning)
        replica = Replica(stub, epoch=1)
        replica.submit(1, count=1000)
        replica.wait_for_tokens(2)
        leader, slow = rank_pids(command.pid)
        os.kill(slow, signal.SIGSTOP)
        try:
            share = busy_shares([leader])[leader]
        finally:
            os.kill(slow, signal.SIGCONT)
        assert share < MOST_BUSY
        assert replica.tokens(1)[: len(wanted)] == wanted
        replica.close()
