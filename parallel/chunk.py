"""How one chunk of a prompt is cut over the cp ranks: zigzag blocks that end at page boundaries.

```
positions   |cached ......|new ...............................................|
pages       | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |          page 3 is half full
                         ^^^  continues page 3: a segment of its own, on that page's owner
                             | b0| b1| b2| b3|...   the new pages in 2·cp blocks, block b on cp rank
                                                    (offset + min(b, 2·cp-1-b)) mod cp
```
Causal work grows with the position, so a rank that takes block b and block 2·cp-1-b does its even share
("Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783, section 3.4.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.arrays import Ints


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A chunk's positions in order: [start, end) each, whose queries, keys and values one cp rank works on; [S]."""

    cp_rank: Ints
    start: Ints
    end: Ints

    def rows_by_rank(self, cp: int) -> Ints:
        """How many positions each of `cp` ranks works on."""
        counts = np.zeros(cp, dtype=np.int64)
        np.add.at(counts, self.cp_rank, self.end - self.start)
        return counts


def new_page_owners(*, pages: int, cp: int, offset: int) -> Ints:
    """The cp rank that owns each of the `pages` pages that a chunk begins: [pages]."""
    return np.repeat(_block_owners(cp=cp, offset=offset), _block_sizes(pages, 2 * cp))


def cut_segments(*, start: int, end: int, page_size: int, owners: npt.ArrayLike) -> Segments:
    """Cuts the positions [start, end) by the owners of their pages, start // page_size to the last.

    Neighbouring pages of one owner are one segment. ValueError where there are not as many owners as pages.
    """
    owner = np.asarray(owners, dtype=np.int64)
    first_page = start // page_size
    if end <= start or len(owner) != -(-end // page_size) - first_page:
        raise ValueError(
            f"the positions [{start}, {end}) lie on {-(-end // page_size) - first_page} pages of {page_size}, one or "
            f"more, but {len(owner)} have owners"
        )
    begins = np.flatnonzero(np.diff(owner, prepend=-1))
    starts = (first_page + begins) * page_size
    starts[0] = start
    return Segments(cp_rank=owner[begins], start=starts, end=np.append(starts[1:], end))


def choose_offset(*, pages: int, cp: int, held: Sequence[int], load: Sequence[int]) -> int:
    """The offset that keeps a sequence even over its cp ranks and, where that leaves a choice, the pool too.

    `held` counts the pages that each rank holds of this sequence, `load` those of all sequences. Over whole blocks a
    chunk adds one page to each rank of an arc of the circle. Where the fuller ranks are an arc, one that begins at its
    end keeps them so, and no rank ever has two pages more than another. Evenness alone is not enough: fuller ranks that
    lie apart leave no room for the next arc, and from five ranks on chunks of equal size then pile up without bound.
    """
    ranks = np.arange(cp)
    added = _counts_at_zero(pages, cp)[(ranks[None, :] - ranks[:, None]) % cp]  # by offset, by rank
    after = np.asarray(held) + added
    edges = (after != np.roll(after, 1, axis=1)).sum(axis=1)
    # Least for the emptiest ranks; the largest load alone would not tell those below it apart.
    pool = ((np.asarray(load) + added) ** 2).sum(axis=1)
    return int(np.lexsort((ranks, pool, edges, after.max(axis=1) - after.min(axis=1)))[0])


def admission_bound(*, pages: int, cp: int) -> int:
    """How many pages of a prompt of `pages` pages any one cp rank may come to hold."""
    return min(-(-pages // cp) + 2, pages) if cp > 1 else pages


def _block_owners(*, cp: int, offset: int) -> Ints:
    """The cp rank of each of the 2·cp zigzag blocks."""
    block = np.arange(2 * cp)
    return (offset + np.minimum(block, 2 * cp - 1 - block)) % cp


def _block_sizes(pages: int, blocks: int) -> Ints:
    """Pages of each block: consecutive, sizes differing by at most one, larger ones first."""
    size, extra = divmod(pages, blocks)
    return size + (np.arange(blocks) < extra)


def _counts_at_zero(pages: int, cp: int) -> Ints:
    """How many pages each cp rank takes at offset 0."""
    sizes = _block_sizes(pages, 2 * cp)
    return sizes[:cp] + sizes[: cp - 1 : -1]
