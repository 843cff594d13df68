"""What an exchange knows of a step's rows in one cache group, alike on every cp rank of a dp coordinate.

```
table        c0 c1 c1 c0 | c0 c1            pages by owner
segment                    [== c0 ==)       its pages have one owner, so of another cp rank it sees whole pages, all of
sees of c0   p  -  -  p    p                those before it, and of its owner a prefix that ends with itself: bottom-
sees of c1   -  p  p  -                     right causal
```
A prompt's segment is computed by the owner of its pages. A decoding row is computed by its sequence's home, whoever
stores it.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from attention.interface import AttentionRows, KvWrite, PageTables
from parallel.arrays import Bools, Ints


@dataclass(frozen=True, kw_only=True)
class ExchangeRows:
    """S segments of C chunks, chunk by chunk in order of position; a rank's rows are those of the segments that it
    computes, in this order.

    Of each segment [S]: its `chunk`, the `slot` of its sequence, the cp ranks `computed_by` and `stored_by`, and its
    positions [start, end). `seen` [S, cp]: pages of each cp rank up to the segment's end; the first `skipped` [S, cp]
    of them are behind the window of all its rows. `first_page` [S] is the page of the sequence with which what it sees
    begins. Of each chunk [C]: `cached_tokens` and `new_tokens`.

    The last `padding` segments are this rank's own and of one row each: they see and are stored in its spare page.

    `tables` hold this rank's own pages of each slot in order of position, `owners` [slots, pages] the cp rank of every
    page.
    """

    page_size: int
    tables: PageTables
    owners: npt.NDArray[np.int16]
    cached_tokens: Ints
    new_tokens: Ints
    chunk: Ints
    slot: Ints
    computed_by: Ints
    stored_by: Ints
    start: Ints
    end: Ints
    seen: Ints
    skipped: Ints
    first_page: Ints
    padding: int = 0

    @property
    def cp(self) -> int:
        """Number of cp ranks."""
        return int(self.seen.shape[1])

    @property
    def num_rows(self) -> Ints:
        """[S]."""
        return self.end - self.start

    @property
    def is_foreign(self) -> Bools:
        """[S]: whether another cp rank stores it than the one that computes it."""
        foreign: Bools = self.computed_by != self.stored_by
        return foreign

    @property
    def chunk_bounds(self) -> tuple[Ints, Ints, Ints]:
        """The chunks that have segments here, ascending, with the places of the first and the last segment of each."""
        chunks, first = np.unique(self.chunk, return_index=True)
        return chunks, first, np.append(first[1:], len(self.chunk)) - 1

    def rows_of(self, cp_rank: int) -> int:
        """How many rows `cp_rank` computes."""
        return int(self.num_rows[self.computed_by == cp_rank].sum())

    def take(self, index: Bools | Ints) -> "ExchangeRows":
        """The segments at `index`; chunks keep their numbers."""
        return replace(
            self,
            chunk=self.chunk[index],
            slot=self.slot[index],
            computed_by=self.computed_by[index],
            stored_by=self.stored_by[index],
            start=self.start[index],
            end=self.end[index],
            seen=self.seen[index],
            skipped=self.skipped[index],
            first_page=self.first_page[index],
            padding=0,
        )

    def over_pages_of(self, cp_rank: int) -> AttentionRows:
        """The segments' rows over the pages that `cp_rank` owns, by that rank's own tables."""
        is_owner = self.stored_by == cp_rank
        tail = np.where(is_owner, -self.end % self.page_size, 0)
        skipped = self.skipped[:, cp_rank]
        return AttentionRows(
            table_row=self.slot,
            first_page=skipped,
            num_rows=self.num_rows,
            kv_len=(self.seen[:, cp_rank] - skipped) * self.page_size - tail,
            causal=is_owner,
        )

    def where_stored(self, *, device: torch.device) -> KvWrite:
        """Where the segments' rows go in the memory of the rank that stores them all, by its own tables."""
        positions = self.positions
        ordinal = np.repeat(self.seen[np.arange(len(self.seen)), self.stored_by] - 1, self.num_rows)
        last_page = np.repeat((self.end - 1) // self.page_size, self.num_rows)
        pages = self.tables.host[np.repeat(self.slot, self.num_rows), ordinal - last_page + positions // self.page_size]
        return kv_write(pages, positions % self.page_size, device=device)

    @property
    def positions(self) -> Ints:
        """Of each row of all segments, in their order."""
        counts = self.num_rows
        first = np.repeat(self.start - (np.cumsum(counts) - counts), counts)
        return first + np.arange(len(first))

    def row_places(self, index: Bools, *, cp_rank: int) -> Ints:
        """Where the rows of the segments at `index` stand among those that `cp_rank` computes."""
        own = self.computed_by == cp_rank
        return np.flatnonzero(np.repeat((index & own)[own], self.num_rows[own]))


def kv_write(pages: npt.ArrayLike, offsets: npt.ArrayLike, *, device: torch.device) -> KvWrite:
    """A KvWrite of numbers that were worked out on the host."""
    both = torch.from_numpy(np.stack([pages, offsets]).astype(np.int32)).to(device, non_blocking=True)
    return KvWrite(pages=both[0], offsets=both[1])
