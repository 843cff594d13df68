"""The cut of a chunk over cp: owners, page boundaries, balance, and the bound that admission counts with."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.chunk import ChunkCut, admission_bound, block_owner, choose_offset, cut_chunk, new_page_counts


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

    def cut(self, new_tokens: int) -> ChunkCut:
        pages = -(-(self.cached_tokens + new_tokens) // self.page_size) - len(self.page_owners)
        offset = choose_offset(pages=pages, cp=self.cp, held=self.held, load=self.load)
        found = cut_chunk(
            cached_tokens=self.cached_tokens,
            new_tokens=new_tokens,
            page_size=self.page_size,
            cp=self.cp,
            offset=offset,
            page_owners=self.page_owners,
        )
        self.cached_tokens += new_tokens
        self.page_owners += found.new_page_owners
        return found


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
        segments = history.cut(new_tokens).segments
        positions = [position for segment in segments for position in range(segment.start, segment.end)]
        assert positions == list(range(start, start + new_tokens))
        assert all(0 <= segment.coordinate < history.cp for segment in segments)


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_every_token_is_on_the_owner_of_its_page(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        for segment in history.cut(new_tokens).segments:
            pages = range(segment.start // history.page_size, (segment.end - 1) // history.page_size + 1)
            assert {history.page_owners[page] for page in pages} == {segment.coordinate}


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
        segments = history.cut(new_tokens).segments
        for before, after in pairwise(segments):
            assert after.start % history.page_size == 0
            assert before.coordinate != after.coordinate


@examples
@given(history=histories(), sizes=chunk_sizes)
def test_no_coordinate_comes_to_hold_more_than_admission_counted(history: History, sizes: list[int]) -> None:
    for new_tokens in sizes:
        history.cut(new_tokens)
        bound = admission_bound(pages=len(history.page_owners), cp=history.cp)
        assert max(history.held) <= bound, (history.held, sizes)


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
        cut = cut_chunk(cached_tokens=0, new_tokens=pages, page_size=1, cp=cp, offset=offset, page_owners=())
        assert counts == tuple(cut.new_page_owners.count(index) for index in range(cp))


@pytest.mark.parametrize("cp", range(1, 9))
@pytest.mark.parametrize("pages_of_block", [1, 2, 5])
@pytest.mark.parametrize("cached_pages", [0, 7])
def test_causal_work_is_exactly_even_where_blocks_are_whole(cp: int, pages_of_block: int, cached_pages: int) -> None:
    pages = 2 * cp * pages_of_block
    cut = cut_chunk(
        cached_tokens=16 * cached_pages,
        new_tokens=16 * pages,
        page_size=16,
        cp=cp,
        offset=0,
        page_owners=[0] * cached_pages,
    )
    work = [0] * cp
    for page, owner in enumerate(cut.new_page_owners, start=cached_pages):
        work[owner] += page + 1
    assert max(work) * cp == sum(work)


def test_blocks_go_to_coordinates_in_a_zigzag() -> None:
    assert [block_owner(block, cp=4, offset=0) for block in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [block_owner(block, cp=4, offset=1) for block in range(8)] == [1, 2, 3, 0, 0, 3, 2, 1]


def test_tokens_that_continue_a_half_full_page_go_to_its_owner() -> None:
    cut = cut_chunk(cached_tokens=20, new_tokens=40, page_size=16, cp=2, offset=0, page_owners=(0, 1))
    first = cut.segments[0]
    assert (first.coordinate, first.start, first.end) == (1, 20, 32)
    assert cut.new_page_owners == (0, 1)


def test_a_continuation_is_joined_with_what_follows_on_the_same_owner() -> None:
    cut = cut_chunk(cached_tokens=20, new_tokens=40, page_size=16, cp=2, offset=1, page_owners=(0, 1))
    assert [(segment.coordinate, segment.start, segment.end) for segment in cut.segments] == [(1, 20, 48), (0, 48, 60)]


def test_one_token_that_fits_the_half_full_page_begins_no_page() -> None:
    cut = cut_chunk(cached_tokens=20, new_tokens=1, page_size=16, cp=4, offset=2, page_owners=(3, 1))
    assert [(segment.coordinate, segment.start, segment.end) for segment in cut.segments] == [(1, 20, 21)]
    assert cut.new_page_owners == ()


def test_a_single_coordinate_takes_a_whole_prompt_as_one_segment() -> None:
    cut = cut_chunk(cached_tokens=0, new_tokens=100, page_size=16, cp=1, offset=0, page_owners=())
    assert [(segment.coordinate, segment.start, segment.end) for segment in cut.segments] == [(0, 0, 100)]
    assert cut.new_page_owners == (0,) * 7
    assert admission_bound(pages=7, cp=1) == 7


def test_short_prompts_spread_over_the_coordinates_that_hold_least() -> None:
    load = [3, 0, 5, 1]
    offset = choose_offset(pages=1, cp=4, held=[0] * 4, load=load)
    assert new_page_counts(pages=1, cp=4, offset=offset) == (0, 1, 0, 0)


def test_the_bound_never_exceeds_the_prompt() -> None:
    assert [admission_bound(pages=pages, cp=4) for pages in (1, 2, 3, 4, 8, 100)] == [1, 2, 3, 3, 4, 27]


def test_a_chunk_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="one new token or more, but got 0 after 5 cached"):
        cut_chunk(cached_tokens=5, new_tokens=0, page_size=16, cp=1, offset=0, page_owners=(0,))


def test_a_table_that_does_not_match_the_cached_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="17 cached tokens fill 2 pages of 16, but the table has 1"):
        cut_chunk(cached_tokens=17, new_tokens=1, page_size=16, cp=1, offset=0, page_owners=(0,))
