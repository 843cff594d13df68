"""The cut of a chunk over cp: owners, page boundaries, balance, and the bound that admission counts with."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.chunk import (
    Segments,
    admission_bound,
    choose_offset,
    cut_segments,
    new_page_owners,
)


@dataclass(kw_only=True)
class History:
    """One sequence whose chunks are cut one after the other, as a leader does."""

    cp: int
    page_size: int
    load: list[int]
    cached_tokens: int = 0
    page_owners: list[int] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        return [self.page_owners.count(index) for index in range(self.cp)]

    def cut(self, new_tokens: int) -> list[tuple[int, int, int]]:
        """The chunk's segments: cp rank, start, end."""
        start, end = self.cached_tokens, self.cached_tokens + new_tokens
        pages = -(-end // self.page_size) - len(self.page_owners)
        offset = choose_offset(pages=pages, cp=self.cp, held=self.held, load=self.load)
        self.page_owners += new_page_owners(pages=pages, cp=self.cp, offset=offset).tolist()
        self.cached_tokens = end
        owners = self.page_owners[start // self.page_size :]
        return listed(cut_segments(start=start, end=end, page_size=self.page_size, owners=owners))


def listed(segments: Segments) -> list[tuple[int, int, int]]:
    return list(zip(segments.cp_rank.tolist(), segments.start.tolist(), segments.end.tolist(), strict=True))


@st.composite
def histories(draw: st.DrawFn) -> History:
    cp = draw(st.integers(1, 8))
    load = draw(st.lists(st.integers(0, 50), min_size=cp, max_size=cp))
    return History(cp=cp, page_size=draw(st.sampled_from([1, 2, 4, 16])), load=load)


chunk_sizes = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 200)), min_size=1, max_size=12)
examples = settings(max_examples=120, deadline=None)


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_every_token_has_exactly_one_owner(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        start = history.cached_tokens
        segments = history.cut(new_tokens)
        positions = [position for _, first, end in segments for position in range(first, end)]
        assert positions == list(range(start, start + new_tokens))
        assert all(0 <= cp_rank < history.cp for cp_rank, _, _ in segments)


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_every_token_is_on_the_owner_of_its_page(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        for cp_rank, start, end in history.cut(new_tokens):
            pages = range(start // history.page_size, (end - 1) // history.page_size + 1)
            assert {history.page_owners[page] for page in pages} == {cp_rank}


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_every_page_is_begun_by_exactly_one_chunk(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        history.cut(new_tokens)
        assert len(history.page_owners) == -(-history.cached_tokens // history.page_size)


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_cuts_are_at_page_boundaries_and_neighbours_differ(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        for (before, _, _), (after, start, _) in pairwise(history.cut(new_tokens)):
            assert start % history.page_size == 0
            assert before != after


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_no_coordinate_comes_to_hold_more_than_admission_counted(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        history.cut(new_tokens)
        bound = admission_bound(pages=len(history.page_owners), cp=history.cp)
        assert max(history.held) <= bound, (history.held, sizes)


def new_page_counts(*, pages: int, cp: int, offset: int) -> list[int]:
    """How many of a chunk's new pages each cp rank takes."""
    owners = new_page_owners(pages=pages, cp=cp, offset=offset).tolist()
    return [owners.count(cp_rank) for cp_rank in range(cp)]


@pytest.mark.parametrize("cp", range(1, 13))
def test_whatever_chunks_come_no_coordinate_gets_two_pages_ahead_of_another(cp: int) -> None:
    """Every state that a sequence can reach, by every chunk up to three rounds of blocks."""
    seen, open_states = {(0,) * cp}, [(0,) * cp]
    while open_states:
        held = open_states.pop()
        for pages in range(6 * cp if cp < 7 else 2 * cp):
            offset = choose_offset(pages=pages, cp=cp, held=held, load=held)
            counts = new_page_counts(pages=pages, cp=cp, offset=offset)
            after = [before + count for before, count in zip(held, counts, strict=True)]
            assert max(after) - min(after) <= 1, (held, pages)
            state = tuple(count - min(after) for count in after)
            if state not in seen:
                seen.add(state)
                open_states.append(state)


@examples
@given(cp=st.integers(1, 9), pages=st.integers(0, 200), offset=st.integers(0, 8))
def test_new_page_counts_are_those_of_the_cut_and_within_an_even_share(cp: int, pages: int, offset: int) -> None:
    counts = new_page_counts(pages=pages, cp=cp, offset=offset)
    assert sum(counts) == pages
    assert max(counts) <= -(-pages // cp)
    if pages:
        owners = new_page_owners(pages=pages, cp=cp, offset=offset)
        segments = cut_segments(start=0, end=pages, page_size=1, owners=owners)
        assert counts == segments.rows_by_rank(cp).tolist()


@pytest.mark.parametrize("cp", range(1, 9))
@pytest.mark.parametrize("pages_of_block", [1, 2, 5])
@pytest.mark.parametrize("cached_pages", [0, 7])
def test_causal_work_is_exactly_even_where_blocks_are_whole(cp: int, pages_of_block: int, cached_pages: int) -> None:
    pages = 2 * cp * pages_of_block
    work = [0] * cp
    for page, owner in enumerate(new_page_owners(pages=pages, cp=cp, offset=0).tolist(), start=cached_pages):
        work[owner] += page + 1
    assert max(work) * cp == sum(work)


def test_blocks_go_to_coordinates_in_a_zigzag() -> None:
    assert new_page_owners(pages=8, cp=4, offset=0).tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert new_page_owners(pages=8, cp=4, offset=1).tolist() == [1, 2, 3, 0, 0, 3, 2, 1]


def test_tokens_that_continue_a_half_full_page_go_to_its_owner() -> None:
    assert new_page_owners(pages=2, cp=2, offset=0).tolist() == [0, 1]
    assert listed(cut_segments(start=20, end=60, page_size=16, owners=[1, 0, 1])) == [
        (1, 20, 32),
        (0, 32, 48),
        (1, 48, 60),
    ]


def test_a_continuation_is_joined_with_what_follows_on_the_same_owner() -> None:
    assert listed(cut_segments(start=20, end=60, page_size=16, owners=[1, 1, 0])) == [(1, 20, 48), (0, 48, 60)]


def test_one_token_that_fits_the_half_full_page_begins_no_page() -> None:
    assert new_page_owners(pages=0, cp=4, offset=2).tolist() == []
    assert listed(cut_segments(start=20, end=21, page_size=16, owners=[1])) == [(1, 20, 21)]


def test_a_single_rank_takes_a_whole_prompt_as_one_segment() -> None:
    owners = new_page_owners(pages=7, cp=1, offset=0)
    assert owners.tolist() == [0] * 7
    assert listed(cut_segments(start=0, end=100, page_size=16, owners=owners)) == [(0, 0, 100)]
    assert admission_bound(pages=7, cp=1) == 7


def test_short_prompts_spread_over_the_coordinates_that_hold_least() -> None:
    load = [3, 0, 5, 1]
    offset = choose_offset(pages=1, cp=4, held=[0] * 4, load=load)
    assert new_page_counts(pages=1, cp=4, offset=offset) == [0, 1, 0, 0]


def test_the_bound_never_exceeds_the_prompt() -> None:
    assert [admission_bound(pages=pages, cp=4) for pages in (1, 2, 3, 4, 8, 100)] == [1, 2, 3, 3, 4, 27]


def test_a_chunk_without_tokens_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"the positions \[5, 5\) lie on 1 pages of 16, one or more, but 1 have owners"
    ):
        cut_segments(start=5, end=5, page_size=16, owners=[0])


def test_owners_that_do_not_match_the_pages_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[17, 18\) lie on 1 pages of 16, one or more, but 2 have owners"):
        cut_segments(start=17, end=18, page_size=16, owners=[0, 0])
