"""Context capacity grows with cp: a cp rank holds its part of a sequence's pages and at most two more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from proto import control_pb2
from tests.engine.simulated_ranks import SimulatedRanks
from worker.engine.page_spread import can_spread, spread

PAGE = 4
LONG, SHORT = (397, 610, 33), tuple(1 + index % 40 for index in range(64))


def ranks(cp: int) -> SimulatedRanks:
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    settings = EngineSettings(page_size=PAGE, max_batch_tokens=100, max_sequences=64, kv_tokens=8000)
    return SimulatedRanks(shape=shape, settings=settings)


def held(running: SimulatedRanks) -> list[int]:
    """Pages that each cp rank has given away, while everything is still there."""
    return [allocator.num_pages - allocator.num_free for allocator in running.leader.allocators()]


def prefilled(lengths: tuple[int, ...], *, cp: int) -> list[int]:
    """Pages of each cp rank when all prompts are computed and none has been handed off."""
    running = ranks(cp)
    for request_id, length in enumerate(lengths, 1):
        # Each begins with a token of its own: shared pages would be counted once.
        prompt_ids = [1000 + request_id, *range(length - 1)]
        running.submit(control_pb2.Submit(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=2, handoff=True))
    while running.wanted or running.plan():
        running.give_targets()
        while running.plan():
            pass
        running.answer_all()
    return held(running)


def reserved(lengths: tuple[int, ...], *, cp: int) -> list[int]:
    """Pages of each cp rank when all are reserved in decode."""
    running = ranks(cp)
    for request_id, length in enumerate(lengths, 1):
        reserve = control_pb2.Reserve(request_id=request_id, prompt_tokens=length, max_new_tokens=16)
        running.leader.handle(control_pb2.ToReplica(reserve=reserve))
    return held(running)


@pytest.mark.parametrize("lengths", [LONG, SHORT], ids=["several chunks", "64 short prompts"])
@pytest.mark.parametrize("pages", [prefilled, reserved], ids=["prefill", "decode"])
def test_a_cp_rank_of_four_holds_a_quarter_and_at_most_two_pages_more_for_each_sequence(
    pages: object, lengths: tuple[int, ...]
) -> None:
    assert callable(pages)
    (whole,) = pages(lengths, cp=1)
    assert whole >= sum(-(-length // PAGE) for length in lengths)
    quarters = pages(lengths, cp=4)
    assert sum(quarters) == whole
    assert max(quarters) <= -(-whole // 4) + 2 * len(lengths)
    # Far less in fact: what is over balances out over the sequences.
    assert max(quarters) - min(quarters) <= 2 + len(lengths) // 8


@given(available=st.lists(st.integers(-1, 9), min_size=1, max_size=4), num_pages=st.integers(1, 20), data=st.data())
def test_pages_that_come_at_once_go_one_by_one_to_the_emptiest(
    available: list[int], num_pages: int, data: st.DataObject
) -> None:
    most = data.draw(st.integers(1, num_pages))
    counts, free, expected = [0] * len(available), list(available), []
    for _ in range(num_pages):
        open_to = [index for index, room in enumerate(free) if room > 0 and counts[index] < most]
        if not open_to:
            assert not can_spread(num_pages, available=available, most=most)
            return
        index = min(open_to, key=lambda index: (counts[index] - free[index], index))
        counts[index] += 1
        free[index] -= 1
        expected.append(index)
    assert can_spread(num_pages, available=available, most=most)
    assert spread(num_pages, available=available, most=most).tolist() == expected
