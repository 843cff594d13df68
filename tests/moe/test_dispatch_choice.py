"""Which dispatcher a step takes: small batches gather, large ones with few experts a row go to their ranks only."""

import pytest

from moe.dispatch_choice import Dispatch, DispatchPolicy
from parallel.link import LINKS, Link
from parallel.shape import ExpertSizes


def policy(*, ep: int, top_k: int, moe_tp: int = 1, forced: Dispatch | None = None) -> DispatchPolicy:
    sizes = ExpertSizes(ep=ep, moe_tp=moe_tp)
    return DispatchPolicy(sizes=sizes, top_k=top_k, row_bytes=8192, link=LINKS[Link.NCCL], forced=forced)


@pytest.mark.parametrize("forced", list(Dispatch))
def test_what_is_forced_is_taken_at_any_size(forced: Dispatch) -> None:
    for rows in (0, 1, 64, 100_000):
        assert policy(ep=8, top_k=2, forced=forced).choose(padded_rows=rows) is forced


@pytest.mark.parametrize(("ep", "top_k"), [(4, 1), (8, 2), (64, 8)])
def test_few_rows_are_gathered_and_many_are_not(ep: int, top_k: int) -> None:
    chosen = [policy(ep=ep, top_k=top_k).choose(padded_rows=rows) for rows in (1, 10, 100, 1000, 10_000, 100_000)]
    assert chosen[0] is Dispatch.GATHER and chosen[-1] is Dispatch.ALL_TO_ALL
    assert chosen == sorted(chosen, key=lambda choice: choice is Dispatch.ALL_TO_ALL), "one crossing"


def test_rows_that_visit_every_rank_are_gathered_at_any_size() -> None:
    # With 32 of the experts on each of 2 ranks, a row misses a rank by all of its 30 choices once in a billion.
    assert policy(ep=2, top_k=30).choose(padded_rows=1000) is Dispatch.GATHER
    assert policy(ep=1, top_k=1, moe_tp=8).choose(padded_rows=1_000_000) is Dispatch.GATHER


def test_where_memory_is_shared_rows_of_two_ranks_are_always_gathered_and_of_more_by_their_number() -> None:
    # To sort a row costs as much as to copy the half of one that need not go.
    def chosen(ep: int, rows: int) -> Dispatch:
        shared = DispatchPolicy(sizes=ExpertSizes(ep=ep), top_k=1, row_bytes=2304, link=LINKS[Link.SHARED_MEMORY])
        return shared.choose(padded_rows=rows)

    assert {chosen(2, rows) for rows in (1, 64, 1024, 100_000)} == {Dispatch.GATHER}
    assert [chosen(4, rows) for rows in (1, 64, 1024)] == [Dispatch.GATHER, Dispatch.GATHER, Dispatch.ALL_TO_ALL]


def test_the_ranks_of_a_block_are_those_of_its_ep_coordinates_in_order() -> None:
    assert ExpertSizes(ep=3, moe_tp=2).block_ep_ranks == (0, 0, 1, 1, 2, 2)
