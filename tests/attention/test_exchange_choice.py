"""Which exchange a chunk takes: the published crossing, what is forced, and what may be held besides the pages."""

from collections.abc import Sequence
from itertools import product

import pytest

from attention.exchange_choice import ExchangePolicy, Strategy
from attention.exchange_chunk import ExchangeChunk
from parallel.chunk import Segment, choose_offset, cut_chunk
from parallel.handoff import PagePlace
from parallel.link import LINKS, LinkSpeed
from parallel.page_table import PageTable

PAGE = 16
#: One of tp 8 ranks of Llama 3 405B; 500 TFLOP/s, and 20 of the 50 GB/s that a 400 Gbit/s card has on paper.
PAPER = ExchangePolicy(
    page_size=PAGE,
    num_heads=16,
    num_kv_heads=1,
    head_dim=128,
    element_bytes=2,
    link=LinkSpeed(flops=5e14, bytes_per_s=2e10, latency_s=2e-5, merge_bytes_per_s=4e11, hidden=1.0),
    max_tokens=1 << 20,
)


def policy(*, max_tokens: int, forced: Strategy | None = None) -> ExchangePolicy:
    return ExchangePolicy(
        page_size=PAGE,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        element_bytes=4,
        link=LINKS["cpu"],
        max_tokens=max_tokens,
        forced=forced,
    )


def chunk(*, cached_tokens: int, new_tokens: int, cp: int) -> ExchangeChunk:
    """A chunk of a sequence whose cached tokens were one chunk before."""
    places: list[PagePlace] = []
    segments: Sequence[Segment] = ()
    for cached, new in ((0, cached_tokens), (cached_tokens, new_tokens)):
        if new:
            owners = [place.coordinate for place in places]
            pages = -(-(cached + new) // PAGE) - len(owners)
            held = [owners.count(index) for index in range(cp)]
            offset = choose_offset(pages=max(pages, 0), cp=cp, held=held, load=held)
            cut = cut_chunk(
                cached_tokens=cached, new_tokens=new, page_size=PAGE, cp=cp, offset=offset, page_owners=owners
            )
            places += [PagePlace(coordinate=owner, page=0) for owner in cut.new_page_owners]
            segments = cut.segments
    table = PageTable(cp=cp, places=places)
    return ExchangeChunk(table=table, segments=segments, cached_tokens=cached_tokens, end=cached_tokens + new_tokens)


@pytest.mark.parametrize(
    ("new_share", "passes_queries"), [(0.01, True), (0.025, True), (0.1, False), (0.2, False), (1.0, False)]
)
def test_the_crossing_is_where_the_paper_measured_it(new_share: float, passes_queries: bool) -> None:
    # arXiv 2411.01783, cp 4, 128000 tokens in all: queries won up to 5% of new tokens, where both took 1.30 s.
    new_tokens = round(128_000 * new_share)
    chosen = PAPER.cheapest(new_tokens=new_tokens, cached_tokens=128_000 - new_tokens, cp=4)
    assert (chosen is Strategy.PASS_Q) == passes_queries


def test_once_kv_is_passed_more_new_tokens_never_go_back_to_queries() -> None:
    for cp, total in product((2, 4, 8), (1000, 10_000, 100_000, 1_000_000)):
        passes_kv = False
        for percent in range(1, 101):
            new_tokens = total * percent // 100
            chosen = PAPER.cheapest(new_tokens=new_tokens, cached_tokens=total - new_tokens, cp=cp)
            passes_kv |= chosen is not Strategy.PASS_Q
            assert not (passes_kv and chosen is Strategy.PASS_Q), (cp, total, percent)


@pytest.mark.parametrize("forced", [Strategy.RING, Strategy.PASS_Q])
def test_a_forced_strategy_is_every_chunks(forced: Strategy) -> None:
    chunks = [chunk(cached_tokens=cached, new_tokens=new, cp=2) for cached in (0, 40, 4000) for new in (1, 33, 500)]
    assert policy(max_tokens=48, forced=forced).choose(chunks, cp=2) == [forced] * len(chunks)


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
@pytest.mark.parametrize("max_tokens", [48, 500, 3000])
def test_gathers_of_a_step_hold_no_more_than_they_may(cp: int, max_tokens: int) -> None:
    chunks = [chunk(cached_tokens=cached, new_tokens=new, cp=cp) for cached in (0, 40, 333) for new in (1, 33, 150)]
    chosen = policy(max_tokens=max_tokens, forced=Strategy.GATHER).choose(chunks, cp=cp)
    gathered = [item for item, strategy in zip(chunks, chosen, strict=True) if strategy is Strategy.GATHER]
    assert held_tokens(gathered, cp=cp) <= max_tokens
    assert set(chosen) <= {Strategy.GATHER, Strategy.RING}
    # What is left out would not have fitted after those before it.
    for index, strategy in enumerate(chosen):
        before = [item for item, choice in zip(chunks[:index], chosen, strict=False) if choice is Strategy.GATHER]
        if strategy is Strategy.RING:
            assert held_tokens([*before, chunks[index]], cp=cp) > max_tokens


def held_tokens(chunks: Sequence[ExchangeChunk], *, cp: int) -> int:
    """The workspace of every coordinate's pages, padded to the longest, and the rank's own pages on their way."""
    longest = max(sum(item.num_pages_of(c, page_size=PAGE) for item in chunks) for c in range(cp))
    return (cp + 1) * longest * PAGE
