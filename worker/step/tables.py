"""A rank's own page tables of one cache group: arrays by slot that plans change and kernels read.

```
slot of this dp coordinate   | own pages of the sequence, in order of position ...        |   on the device and the host
0 .. max_sequences - 1       | owners: the cp rank of every page, by the page's place ... |   on the host
max_sequences                | the spare slot: the spare page, for rows that are padding  |
```
"""

import numpy as np
import numpy.typing as npt
import torch

from attention.interface import PageTables
from parallel.arrays import Ints
from parallel.page_columns import PageColumns

#: Pages of a sequence for which there is room at first.
_FIRST_WIDTH = 64


class GroupTables:
    """The tables of one cache group, of the sequences of one dp coordinate."""

    def __init__(
        self,
        *,
        num_slots: int,
        cp: int,
        cp_rank: int,
        page_size: int,
        spare_page: int,
        device: torch.device,
        first_width: int = _FIRST_WIDTH,
    ) -> None:
        """`num_slots` slots and after them the spare one, whose table is `spare_page`. There is room for `first_width`
        pages of a sequence before the arrays grow.
        """
        self._cp = cp
        self._cp_rank = cp_rank
        self._page_size = page_size
        self._device = device
        self._own = np.zeros((num_slots + 1, first_width), dtype=np.int32)
        self._own[-1, 0] = spare_page
        self._on_device = torch.from_numpy(self._own).to(device)
        self.owners: npt.NDArray[np.int16] = np.zeros((num_slots + 1, first_width), dtype=np.int16)
        self._num_pages = np.zeros(num_slots + 1, dtype=np.int64)
        self._num_own = np.zeros(num_slots + 1, dtype=np.int64)
        self._begun = np.zeros((num_slots + 1, cp), dtype=np.int64)  # pages that planned positions have begun

    @property
    def tables(self) -> PageTables:
        """This rank's own pages of each slot."""
        return PageTables(host=self._own, device=self._on_device)

    def clear(self, slot: int, *, first_page: int) -> None:
        """A new sequence takes `slot`; its table begins with its page `first_page`."""
        self._num_pages[slot] = first_page
        self._num_own[slot] = 0
        self._begun[slot] = 0

    def append(self, slots: Ints, columns: PageColumns) -> None:
        """Adds pages, each at the end of its slot's table; those of a slot follow each other in `columns`."""
        if not len(slots):
            return
        place = self._num_pages[slots] + _number_in_run(slots)
        self._grow(int(place.max()) + 1)
        self.owners[slots, place] = columns.cp_ranks
        # Of equal slots the last one is set last, and its place is the highest.
        self._num_pages[slots] = place + 1
        is_own = columns.cp_ranks == self._cp_rank
        self._append_own(slots[is_own], columns.pages[is_own])

    def advance(self, slots: Ints, *, starts: Ints, ends: Ints) -> None:
        """The positions [start, end) of each slot are planned; each slot once."""
        self._begun[slots] = self.begun(slots, starts=starts, ends=ends)

    def begun(self, slots: Ints, *, starts: Ints, ends: Ints) -> Ints:
        """[n, cp]: pages of each cp rank that positions below `end` have begun, where those below `start` are planned
        already.
        """
        first, end = -(-starts // self._page_size), -(-ends // self._page_size)
        begun: Ints = self._begun[slots] + self.between(slots, first=first, end=end)
        return begun

    def between(self, slots: Ints, *, first: Ints, end: Ints) -> Ints:
        """[n, cp]: how many of a sequence's pages [first, end) each cp rank owns."""
        lengths = np.maximum(end - first, 0)
        if self._cp == 1:
            alone: Ints = lengths[:, None]
            return alone
        found = np.zeros((len(slots), self._cp), dtype=np.int64)
        if lengths.any():
            # A number for each page: the row of `found` that it is counted in, and its owner.
            row = np.repeat(np.arange(len(slots)), lengths)
            place = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(row))
            cell = row * self._cp + self.owners[slots[row], place]
            found[:] = np.bincount(cell, minlength=found.size).reshape(found.shape)
        return found

    def owner_of(self, slots: Ints, pages: Ints) -> Ints:
        """The cp rank of a page of each slot."""
        return self.owners[slots, pages].astype(np.int64)

    def last_pages(self, slot: int, *, first: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
        """Of a sequence's pages [first, end), the last that planned positions have begun: their owners, and of this
        rank's own their numbers (0 of the others). Copies: they stay as they are.
        """
        owners = self.owners[slot, first:end].copy()
        is_own = owners == self._cp_rank
        numbers = np.zeros(end - first, dtype=np.int32)
        begun = int(self._begun[slot, self._cp_rank])
        numbers[is_own] = self._own[slot, begun - int(is_own.sum()) : begun]
        return owners, numbers

    def _append_own(self, slots: Ints, pages: npt.NDArray[np.int32]) -> None:
        if not len(slots):
            return
        place = self._num_own[slots] + _number_in_run(slots)
        self._own[slots, place] = pages
        self._num_own[slots] = place + 1
        if not self._on_device.is_cpu:
            index = torch.from_numpy(np.stack([slots, place])).to(self._device, non_blocking=True)
            self._on_device[index[0], index[1]] = torch.from_numpy(pages).to(self._device, non_blocking=True)

    def _grow(self, width: int) -> None:
        """Makes room for `width` pages of a sequence; all rows are as long as the longest."""
        if width <= self._own.shape[1]:
            return
        more = max(width, 2 * self._own.shape[1]) - self._own.shape[1]
        self._own = np.pad(self._own, ((0, 0), (0, more)))
        self.owners = np.pad(self.owners, ((0, 0), (0, more)))
        self._on_device = torch.from_numpy(self._own).to(self._device)


def _number_in_run(values: Ints) -> Ints:
    """Of each value how many equal ones stand right before it."""
    number = np.arange(len(values))
    is_first = np.ones(len(values), dtype=np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return number - np.maximum.accumulate(np.where(is_first, number, 0))
