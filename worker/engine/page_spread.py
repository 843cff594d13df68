"""Where the pages of a sequence go whose KV comes all at once. Pure."""

from collections.abc import Sequence

import numpy as np

from parallel.arrays import Ints


def can_spread(num_pages: int, *, available: Sequence[int], most: int) -> bool:
    """Whether cp ranks with so many pages `available` hold `num_pages`, none of them more than `most`."""
    return sum(min(free, most) for free in available if free > 0) >= num_pages


def spread(num_pages: int, *, available: Sequence[int], most: int) -> Ints:
    """The cp rank of each page: [num_pages]. Each goes where fewest are of this sequence and most room is, the lowest
    of such ranks first: so its context is read evenly.
    """
    counts = [max(min(free, most), 0) for free in available]
    ranks = np.repeat(np.arange(len(available)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    # A page that is taken is one more of this sequence, and one less that is free.
    order = np.argsort(2 * number - np.repeat(available, counts), kind="stable")
    return ranks[order[:num_pages]]
