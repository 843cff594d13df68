"""Decode in a higher epoch while prefill goes on and hand-offs are under way: nothing old lands in the new one."""

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest

from benchmarks.bench import Bench, drain, running_bench
from benchmarks.pools import pool
from parallel.settings import EngineSettings
from router.errors import ClusterError, HandoffFailedError
from router.generation import Generation, GenerationRequest
from tests.harness.checkpoints import VOCAB_SIZE, Oracle
from tests.harness.router_process import rank_pids
from tests.harness.running_router import greedy

NUM_TOKENS = 12
ENGINE = EngineSettings(page_size=4, kv_tokens=4096, max_sequences=32, max_batch_tokens=64)


def requests() -> list[GenerationRequest]:
    """Prompts of one to several chunks; each begins with a token of its own, so that none finds another cached."""
    lengths = (5, 33, 64, 150, 300, 17, 90, 210)
    return [
        greedy([(n + 7 * i) % VOCAB_SIZE for i in range(length)], max_new_tokens=NUM_TOKENS)
        for n, length in enumerate(lengths)
    ]


async def outcome(generation: Generation) -> type[Exception] | None:
    """What it failed with, None where it was finished."""
    try:
        await drain(generation)
    except (ClusterError, HandoffFailedError) as error:
        return type(error)
    return None


async def replace_under_hand_offs(
    bench: Bench, oracle: Oracle, *, after: int, killed: Sequence[int] = ()
) -> Sequence[type[Exception] | None]:
    """Replaces decode, its processes `killed` before, when `after` of the requests have their first token; returns what
    became of each.
    """
    generations = [bench.dispatcher.submit(request) for request in requests()]
    while sum(bool(generation.token_ids) for generation in generations) < after:
        await asyncio.sleep(0.001)
    known = len(bench.lost)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    while len(bench.lost) < known + len(killed):
        await asyncio.sleep(0.01)
    await bench.replace_decode(model=str(oracle.folder), is_dead=bool(killed))
    outcomes = [await outcome(generation) for generation in generations]
    for generation in generations:
        assert_a_prefix(generation, oracle)
    while bench.dispatcher.num_held:
        await asyncio.sleep(0.005)
    return outcomes


def assert_a_prefix(generation: Generation, oracle: Oracle) -> None:
    """What its client got is what an undisturbed run gives, as far as it goes."""
    wanted = oracle.answer(generation.request.prompt_ids, 64).token_ids
    assert tuple(generation.token_ids) == tuple(wanted[: len(generation.token_ids)])


@pytest.mark.timeout(200)
def test_a_decode_replica_is_replaced_under_hand_offs_and_prefill_goes_on(llama: Oracle) -> None:
    seen: set[type[Exception] | None] = set()
    pools = [pool("prefill", ENGINE, cp=2), pool("decode", ENGINE, dp=2)]
    with running_bench(num_devices=4, model=str(llama.folder)) as bench, bench.pools(pools, model=str(llama.folder)):
        for after in (0, 1, 4, 8):
            seen |= set(bench.run(replace_under_hand_offs(bench, llama, after=after), timeout_s=60))
            for generation in bench.finish(requests(), timeout_s=60):
                assert len(generation.token_ids) == NUM_TOKENS
                assert_a_prefix(generation, llama)
    assert seen - {None}, "nothing was under way when decode was replaced"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("transports", ["tcp,self", "shm,self,tcp"])
def test_a_decode_replica_that_is_killed_under_hand_offs_takes_no_writer_down(
    transports: str, llama: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    model = str(llama.folder)
    pools = [pool("prefill", ENGINE, cp=2), pool("decode", ENGINE, dp=2)]
    with running_bench(num_devices=4, model=model, outlives_ranks=True) as bench, bench.pools(pools, model=model):
        *writers, _, _ = rank_pids(bench.launcher_pid)
        for after in (0, 2, 5):
            killed = rank_pids(bench.launcher_pid)[2:]
            bench.run(replace_under_hand_offs(bench, llama, after=after, killed=killed), timeout_s=60)
            for generation in bench.finish(requests(), timeout_s=60):
                assert len(generation.token_ids) == NUM_TOKENS
                assert_a_prefix(generation, llama)
        assert rank_pids(bench.launcher_pid)[:2] == writers
