"""The page allocator under random histories, and the proof that it gives of itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.settings import EngineSettings
from tests.harness.cache_groups import full_group
from worker.engine.group_pages import GroupPages
from worker.engine.page_allocator import PageAllocator

STEPS = st.lists(st.tuples(st.sampled_from(["promise", "take", "settle", "release"]), st.integers(0, 5)), max_size=60)


def group_pages(*, cp: int, num_pages: int) -> GroupPages:
    settings = EngineSettings(page_size=4, kv_tokens=4 * num_pages)
    return GroupPages(full_group(), cp=cp, pp=1, settings=settings)


@given(steps=STEPS, cp=st.integers(1, 4), num_pages=st.integers(1, 12))
def test_every_page_is_free_or_has_one_owner_whatever_happens(
    steps: list[tuple[str, int]], cp: int, num_pages: int
) -> None:
    pages = group_pages(cp=cp, num_pages=8)
    taken: dict[int, list[int]] = {}
    for verb, request_id in steps:
        known = request_id in taken
        if verb == "promise" and not known and pages.fits(num_pages):
            pages.promise(request_id, num_pages)
            taken[request_id] = []
        elif verb == "take" and known and any(room := pages.room(request_id)):
            cp_rank = room.index(max(room))
            taken[request_id].append(pages.begin_one(request_id, cp_rank))
            assert list(pages.holding(request_id).pages) == taken[request_id]
        elif verb == "settle" and known:
            pages.settle(request_id)
            assert not any(pages.room(request_id))
        elif verb == "release" and known:
            pages.release(request_id)
            del taken[request_id]
        pages.check_integrity()
    for request_id in taken:
        pages.release(request_id)
    assert pages.available() == [8] * cp


def test_what_was_promised_is_there_and_what_was_not_is_refused() -> None:
    pages = group_pages(cp=2, num_pages=4)
    pages.promise(1, 3)  # at most three on each cp rank
    assert not pages.fits(2)
    with pytest.raises(ValueError, match="cannot promise 2 pages"):
        pages.promise(2, 2)
    pages.begin(1, np.array([0, 0, 0]))
    with pytest.raises(ValueError, match="used all pages promised"):
        pages.begin_one(1, 0)
    pages.settle(1)
    assert pages.available() == [1, 4]


def test_a_page_that_is_not_ones_own_cannot_be_given_back() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.take(1)
    with pytest.raises(ValueError, match="is not owned by"):
        allocator.give_back(2, [page])


def test_integrity_finds_a_leak_and_a_page_with_two_owners() -> None:
    allocator = PageAllocator(3)
    (page,) = allocator.take(1)
    with pytest.raises(AssertionError, match="differ"):
        allocator.check_integrity([])
    with pytest.raises(AssertionError, match="is in the tables of"):
        allocator.check_integrity([(1, [page]), (2, [page])])
    allocator.check_integrity([(1, [page])])
