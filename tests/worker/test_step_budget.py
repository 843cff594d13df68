"""How much Python a step takes, counted in calls: it grows with a rank's own sequences and with what is new, and with
nothing else.
"""

import gc
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import pytest

from benchmarks.exchange_steps import cache_group
from benchmarks.step_cost import DecodingReplica, backends
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from proto import control_pb2, step_pb2
from tests.harness.cache_groups import full_group, window_group
from worker.engine.leader import Leader
from worker.engine.pages import DpPages
from worker.engine.prefix_cache import CachedPage


def calls_of(work: Callable[[], object]) -> int:
    """Calls of Python functions and of built-in ones while `work` runs."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    # Whoever is told of the collector's rounds, as test libraries are, would be counted where one falls in here.
    gc.disable()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


#: Steps in which every sequence begins as many pages.
STEPS = 16


def rank_calls(*, dp: int, context: int) -> int:
    """Of a rank with 8 sequences of its own."""
    replica, kernel, total = DecodingReplica(dp=dp, sequences=8, context=context), backends()["flashinfer"], 0
    for message, _ in islice(replica.plans(), STEPS):
        total += calls_of(partial(replica.rank_step, message, kernel))
    return total


@pytest.mark.timeout(120)
def test_a_rank_does_as_much_at_any_dp_and_at_any_context() -> None:
    expected = rank_calls(dp=1, context=64)
    assert rank_calls(dp=4, context=64) == expected
    assert rank_calls(dp=1, context=32768) == expected


def leader_calls(*, sequences: int, context: int) -> int:
    """Of a leader's steps, results included."""
    replica = DecodingReplica(dp=2, sequences=sequences, context=context)
    return calls_of(lambda: list(replica.leader_steps(runs=STEPS)))


@pytest.mark.timeout(120)
def test_a_leader_does_as_much_for_a_decoding_sequence_at_any_context() -> None:
    assert leader_calls(sequences=8, context=32768) == leader_calls(sequences=8, context=64)


@pytest.mark.timeout(120)
def test_a_leader_does_few_calls_for_each_decoding_sequence() -> None:
    few, many = (leader_calls(sequences=count, context=64) for count in (8, 72))
    assert (many - few) / (2 * 64 * STEPS) < 20


def prompt_calls(*, cp: int, chunks: int) -> list[int]:
    """Of the leader, for each chunk of one long prompt; every rank answers at once."""
    settings = EngineSettings(page_size=16, max_batch_tokens=512, kv_tokens=1 << 20, prefix_cache=False)
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    leader = Leader(shape=shape, settings=settings, groups=[cache_group()])
    prompt = [1] * (chunks * settings.max_batch_tokens)
    submit = control_pb2.Submit(request_id=1, prompt_ids=prompt, max_new_tokens=1)
    leader.handle(control_pb2.ToReplica(submit=submit))
    found = []

    def step() -> None:
        plans = leader.next_plan()
        assert plans is not None
        for rank in range(cp):
            slots = [prompt.slot for prompt in plans[0].prompts if prompt.sample and rank == 0]
            leader.handle_result(
                step_pb2.StepResult(step_id=plans[0].step_id, global_rank=rank, slots=slots, token_ids=slots)
            )

    for _ in range(chunks):
        found.append(calls_of(step))
    return found


@pytest.mark.timeout(120)
def test_a_leader_does_as_much_for_a_prompts_last_chunk_as_for_its_second() -> None:
    calls = prompt_calls(cp=4, chunks=64)
    assert max(calls[32:-1]) <= 1.1 * max(calls[1:32])


class CountedKeys(list[bytes]):
    """Keys of a prefix, and how many of them were taken out one by one or by slices."""

    num_taken = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_taken += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)


def lookup_work(*windows: int, num_pages: int) -> tuple[int, int]:
    """Of looking a prefix up of which the last window's group has lost every page and all others none: calls, and keys
    that were taken.
    """
    settings = EngineSettings(page_size=16, kv_tokens=1 << 20)
    groups = [full_group(), *map(window_group, windows)]
    pages = DpPages(groups, cp=1, pp=1, settings=settings)
    keys = CountedKeys(index.to_bytes(16) for index in range(num_pages))
    for group in pages.groups[:-1]:
        for page, key in enumerate(keys):
            group._cache.publish(key, CachedPage(cp_rank=0, page=page), reader=1)
    calls = calls_of(lambda: pages.num_cached(keys))
    assert pages.num_cached(keys) == 0
    return calls, keys.num_taken


@pytest.mark.parametrize("windows", [(128,), (128, 128), (1 << 14, 128)])
def test_looking_a_prefix_up_takes_as_much_for_each_page_however_many_there_are(windows: tuple[int, ...]) -> None:
    few, many = (lookup_work(*windows, num_pages=num_pages) for num_pages in (200, 2000))
    assert all(last < 11 * first for first, last in zip(few, many, strict=True)), (few, many)
