"""Sequences are parted into padded batches that lose none and stay within their limits."""

from hypothesis import given
from hypothesis import strategies as st

from attention.torch_kernel.batching import plan_batches


@given(
    num_pages=st.lists(st.integers(1, 200), max_size=40),
    max_batch_pages=st.integers(1, 300),
    max_padding_pages=st.integers(0, 30),
)
def test_every_sequence_is_in_one_batch_and_every_batch_keeps_its_limits(
    num_pages: list[int], max_batch_pages: int, max_padding_pages: int
) -> None:
    batches = plan_batches(num_pages, max_batch_pages=max_batch_pages, max_padding_pages=max_padding_pages)
    assert sorted(index for batch in batches for index in batch) == list(range(len(num_pages)))
    for batch in batches:
        sizes = [num_pages[index] for index in batch]
        assert len(batch) == 1 or len(batch) * max(sizes) <= max_batch_pages
        assert sum(max(sizes) - size for size in sizes) <= max_padding_pages


def test_equal_sequences_keep_their_order() -> None:
    assert plan_batches([5] * 7, max_batch_pages=15, max_padding_pages=0) == [[0, 1, 2], [3, 4, 5], [6]]


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    assert plan_batches([2, 100, 3, 2], max_batch_pages=1000, max_padding_pages=4) == [[1], [2, 0, 3]]
