"""The page allocator under random histories, and the proof that it gives of itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.handoff import PagePlace
from worker.engine.pages import DpPages, PageAllocator

STEPS = st.lists(st.tuples(st.sampled_from(["promise", "take", "settle", "release"]), st.integers(0, 5)), max_size=60)


@given(steps=STEPS, cp=st.integers(1, 4), wanted=st.integers(1, 5))
def test_every_page_is_free_or_has_one_owner_whatever_happens(
    steps: list[tuple[str, int]], cp: int, wanted: int
) -> None:
    pages = DpPages(cp=cp, num_pages=8)
    left: dict[int, list[int]] = {}
    for verb, request_id in steps:
        known = request_id in left
        if verb == "promise" and not known and pages.fits(wanted):
            pages.promise(request_id, wanted)
            left[request_id] = [wanted] * cp
        elif verb == "take" and known and any(left[request_id]):
            cp_rank = max(range(cp), key=lambda index: left[request_id][index])
            left[request_id][cp_rank] -= 1
            assert pages.take(request_id, cp_rank=cp_rank) == pages.table(request_id)[-1]
        elif verb == "settle" and known:
            pages.settle(request_id)
            left[request_id] = [0] * cp
        elif verb == "release" and known:
            pages.release(request_id)
            del left[request_id]
        pages.check_integrity()
    for request_id in left:
        pages.release(request_id)
    assert pages.num_free == 8 * cp


def test_what_was_promised_is_there_and_what_was_not_is_refused() -> None:
    pages = DpPages(cp=2, num_pages=4)
    pages.promise(1, 3)
    assert not pages.fits(2)
    with pytest.raises(ValueError, match="cannot promise 2 pages"):
        pages.promise(2, 2)
    for _ in range(3):
        pages.take(1, cp_rank=0)
    with pytest.raises(ValueError, match="used all pages promised"):
        pages.take(1, cp_rank=0)
    pages.settle(1)
    assert pages.available() == [1, 4]


def test_a_page_that_is_not_ones_own_cannot_be_given_back() -> None:
    allocator = PageAllocator(2)
    page = allocator.take(1)
    with pytest.raises(ValueError, match="is not owned by"):
        allocator.give_back(2, [page])


def test_integrity_finds_a_leak_and_a_page_with_two_owners() -> None:
    allocator = PageAllocator(3)
    page = allocator.take(1)
    with pytest.raises(AssertionError, match="differ"):
        allocator.check_integrity([])
    with pytest.raises(AssertionError, match="is in the tables of"):
        allocator.check_integrity([(1, [page]), (2, [page])])
    allocator.check_integrity([(1, [page])])
    assert PagePlace(coordinate=0, page=page) == PagePlace(coordinate=0, page=page)
