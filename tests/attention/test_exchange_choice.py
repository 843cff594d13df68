"""Which exchange a chunk takes: the published crossing, what is forced, and what may be held besides the pages."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from attention.exchange.choice import ExchangePolicy, Strategy
from benchmarks.exchange_steps import StepChunk, exchange_policy, exchange_rows
from parallel.link import LINKS, Link

PAGE = 16


def policy(*, max_tokens: int, forced: Strategy | None = None, window: int = 0) -> ExchangePolicy:
    return exchange_policy(
        num_heads=8, num_kv_heads=2, head_dim=64, page_size=PAGE, max_tokens=max_tokens, forced=forced, window=window
    )


#: One of tp 8 ranks of Llama 3 405B; 500 TFLOP/s, and 20 of the 50 GB/s that a 400 Gbit/s card has on paper.
PAPER = exchange_policy(
    page_size=PAGE,
    num_heads=16,
    num_kv_heads=1,
    head_dim=128,
    element_bytes=2,
    link=replace(LINKS[Link.NCCL], flops=5e14, bytes_per_s=2e10),
    max_tokens=1 << 20,
)


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


@pytest.mark.parametrize("link", list(Link))
def test_many_decoding_sequences_share_a_message_and_pass_queries_where_one_alone_may_gather(link: Link) -> None:
    by = exchange_policy(num_heads=9, num_kv_heads=3, head_dim=64, page_size=PAGE, link=LINKS[link])
    for context in (16, 100, 511, 4095):
        alone, beside = (
            by.cheapest(new_tokens=1, cached_tokens=context, cp=2, num_chunks=count) is Strategy.PASS_Q
            for count in (1, 64)
        )
        assert beside >= alone
    assert by.cheapest(new_tokens=1, cached_tokens=511, cp=2, num_chunks=64) is Strategy.PASS_Q


def test_chunks_that_see_nothing_elsewhere_have_no_share_of_a_message() -> None:
    by = exchange_policy(num_heads=9, num_kv_heads=3, head_dim=64, page_size=PAGE, link=LINKS[Link.GLOO])
    short = StepChunk(cached_tokens=0, new_tokens=3)
    decoding = StepChunk(cached_tokens=511, new_tokens=1, home=0)
    alone = chosen_for([decoding], cp=2, by=by)
    assert chosen_for([decoding, *[short] * 20], cp=2, by=by) == [*alone, *[Strategy.LOCAL] * 20]
    assert alone == [Strategy.GATHER] and chosen_for([decoding] * 8, cp=2, by=by) == [Strategy.PASS_Q] * 8


def chunks_of(cached: Sequence[int], new: Sequence[int]) -> list[StepChunk]:
    return [StepChunk(cached_tokens=before, new_tokens=tokens) for before in cached for tokens in new]


def chosen_for(chunks: Sequence[StepChunk], *, cp: int, by: ExchangePolicy) -> list[Strategy]:
    """Every cp rank chooses alike."""
    found = [by.choose(exchange_rows(chunks, cp=cp, cp_rank=rank, page_size=PAGE)) for rank in range(cp)]
    assert all(other == found[0] for other in found)
    return found[0]


@pytest.mark.parametrize("forced", [Strategy.RING, Strategy.PASS_Q])
def test_a_forced_strategy_is_every_chunks_that_sees_other_ranks_pages(forced: Strategy) -> None:
    chunks = chunks_of((0, 40, 4000), (1, 33, 500))
    chosen = chosen_for(chunks, cp=2, by=policy(max_tokens=48, forced=forced))
    assert chosen == [Strategy.LOCAL, *[forced] * (len(chunks) - 1)]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
@pytest.mark.parametrize("max_tokens", [48, 500, 3000])
def test_gathers_of_a_step_hold_no_more_than_they_may(cp: int, max_tokens: int) -> None:
    chunks = chunks_of((0, 40, 333), (17, 33, 150))
    chosen = chosen_for(chunks, cp=cp, by=policy(max_tokens=max_tokens, forced=Strategy.GATHER))
    gathered = [item for item, strategy in zip(chunks, chosen, strict=True) if strategy is Strategy.GATHER]
    assert held_tokens(gathered, cp=cp) <= max_tokens
    assert set(chosen) <= {Strategy.GATHER, Strategy.RING}
    # What is left out would not have fitted after those before it.
    for index, strategy in enumerate(chosen):
        before = [item for item, choice in zip(chunks[:index], chosen, strict=False) if choice is Strategy.GATHER]
        if strategy is Strategy.RING:
            assert held_tokens([*before, chunks[index]], cp=cp) > max_tokens


def held_tokens(chunks: Sequence[StepChunk], *, cp: int) -> int:
    """The workspace of every cp rank's pages, padded to the longest, and the rank's own pages on their way."""
    if not chunks:
        return 0
    rows = exchange_rows(chunks, cp=cp, cp_rank=0, page_size=PAGE)
    last = np.append(np.flatnonzero(np.diff(rows.chunk)), len(rows.chunk) - 1)
    return (cp + 1) * int(rows.seen[last].sum(axis=0).max()) * PAGE


def test_what_a_window_sees_is_gathered_in_parts_within_the_bound_or_of_one_chunk() -> None:
    chunks = chunks_of((0, 40, 333), (17, 33, 150))
    by = policy(max_tokens=500, forced=Strategy.RING, window=24)
    rows = exchange_rows(chunks, cp=2, cp_rank=0, page_size=PAGE)
    parts = list(by.parts(rows))
    assert {strategy for strategy, _ in parts} == {Strategy.GATHER} and len(parts) > 2
    assert np.array_equal(np.sum([index for _, index in parts], axis=0), np.ones(len(rows.chunk)))


@pytest.mark.parametrize("window", [0, 24])
def test_a_step_without_chunks_exchanges_nothing(window: int) -> None:
    rows = exchange_rows([], cp=2, cp_rank=0, page_size=PAGE)
    assert list(policy(max_tokens=500, window=window).parts(rows)) == []


def test_a_row_at_home_beside_its_pages_needs_no_exchange_and_one_whose_page_is_elsewhere_does() -> None:
    chunks = [StepChunk(cached_tokens=3, new_tokens=1, home=home) for home in (0, 1)]
    rows = exchange_rows(chunks, cp=2, cp_rank=0, page_size=PAGE)
    by = policy(max_tokens=500, forced=Strategy.PASS_Q)
    assert rows.stored_by.tolist() == [0, 0]
    assert chosen_for(chunks, cp=2, by=by) == [Strategy.LOCAL, Strategy.PASS_Q]
