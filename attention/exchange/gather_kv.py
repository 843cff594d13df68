"""Gathered KV: every cp rank's pages of the sequences in one workspace, in which attention is then as on one rank.

```
workspace   | pages of rank 0 ... pad | rows | pages of rank 1 ... pad | rows | ...  [cp · (padded + extra), page_bytes]
```
`rows` are the new K and V that a rank has computed for pages of another: their owner takes them out, and who attends
writes its own ones into the copies, which left before they were there.
"""

from collections.abc import Sequence

import numpy as np
import torch

from attention.exchange.member import CpMember
from attention.exchange.own_writes import plan_foreign_rows, plan_own_writes
from attention.exchange.row_packing import RowPacking
from attention.exchange.rows import ExchangeRows, kv_write
from attention.interface import AttentionRows, KvWrite, PageTables
from attention.layer_memory import LayerMemory
from parallel.arrays import Ints


class GatherKv:
    """See Exchange. Each rank contributes its pages chunk by chunk, padded to the longest contribution."""

    def __init__(self, rows: ExchangeRows, *, member: CpMember) -> None:
        self._group = member.group
        self._backend = member.backend
        self._writes = plan_own_writes(rows, cp_rank=member.group.index, device=member.device)
        self._foreign = plan_foreign_rows(rows, cp_rank=member.group.index, device=member.device)
        self._packing = RowPacking(member.backend.spec.page)
        page_bytes = member.backend.spec.page.page_bytes
        self._extra = -(-self._foreign.most * self._packing.row_bytes // page_bytes)
        pages = _GatheredPages(rows, extra=self._extra)
        self._own = torch.from_numpy(pages.own(member.group.index)).to(member.device, non_blocking=True)
        self._num_pages = pages.padded
        own = rows.take(rows.computed_by == member.group.index)
        tables = PageTables.from_host(pages.addresses(), device=member.device)
        self._plan = member.backend.plan(tables, pages.entries(own))
        self._patch = pages.where(own.take(own.is_foreign), tables=tables, device=member.device)

    def attend(
        self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Exchange."""
        self._writes.write(planes, layer, backend=self._backend)
        own = layer.pages.new_empty((self._num_pages + self._extra, layer.pages.shape[1]))
        torch.index_select(layer.pages, 0, self._own, out=own[: self._num_pages])
        if self._extra:
            packed = self._packing.pack(planes, self._foreign.sent, rows=self._foreign.most)
            own[self._num_pages :].view(-1)[: packed.numel()] = packed.view(-1)
        everyone = self._group.all_gather(own)
        workspace = layer.over(everyone.flatten(0, 1))
        if self._extra:
            self._take_rows(everyone, planes, layer, workspace)
        if with_lse:
            return self._plan.run_with_lse(q, workspace)
        return self._plan.run(q, workspace), None

    def _take_rows(
        self, everyone: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, workspace: LayerMemory
    ) -> None:
        """Writes other ranks' rows into this rank's pages, and its own into the copies of theirs."""
        size = self._foreign.most * self._packing.row_bytes
        packed = everyone[:, self._num_pages :].flatten(1)[:, :size].reshape(-1, self._packing.row_bytes)
        received = self._packing.unpack(packed.index_select(0, self._foreign.taken))
        self._backend.write(layer, received, self._foreign.where)
        own = [plane.index_select(0, self._foreign.sent) for plane in planes]
        self._backend.write(workspace, own, self._patch)


class _GatheredPages:
    """Which pages of each cp rank the chunks of `rows` see, and where they are in the workspace."""

    def __init__(self, rows: ExchangeRows, *, extra: int) -> None:
        self._rows = rows
        # Segments follow each other in order of position: the last one's end is the chunk's.
        self._chunks, first, last = rows.chunk_bounds
        self._slots = rows.slot[first]
        self._first_page = rows.first_page[first]
        self._end_page = -(-rows.end[last] // rows.page_size)
        self._skipped, seen = rows.skipped[first], rows.seen[last]
        self._counts = seen - self._skipped
        totals = self._counts.sum(axis=0)
        self.padded = int(totals.max(initial=0))
        """Pages of each rank's contribution."""
        begins = np.arange(rows.cp) * (self.padded + extra)
        self._begins = begins + np.cumsum(self._counts, axis=0) - self._counts

    def own(self, cp_rank: int) -> Ints:
        """The pages that `cp_rank` contributes, by its own tables: int64 [padded]."""
        found = np.zeros(self.padded, dtype=np.int64)
        place = 0
        for slot, first, count in zip(self._slots, self._skipped[:, cp_rank], self._counts[:, cp_rank], strict=True):
            found[place : place + count] = self._rows.tables.host[slot, first : first + count]
            place += int(count)
        return found

    def addresses(self) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """For each chunk its pages in the workspace, in order of position: int32 [C, pages of the longest]."""
        lengths = self._end_page - self._first_page
        table = np.zeros((len(self._slots), int(lengths.max(initial=0))), dtype=np.int32)
        for chunk, (slot, first, length) in enumerate(zip(self._slots, self._first_page, lengths, strict=True)):
            owners = self._rows.owners[slot, first : first + length]
            for cp_rank in range(self._rows.cp):
                places = np.flatnonzero(owners == cp_rank)
                table[chunk, places] = self._begins[chunk, cp_rank] + np.arange(len(places))
        return table

    def entries(self, own: ExchangeRows) -> AttentionRows:
        """The segments `own` over the workspace: causal, as on one rank."""
        chunk = np.searchsorted(self._chunks, own.chunk)
        return AttentionRows(
            table_row=chunk,
            first_page=own.first_page - self._first_page[chunk],
            num_rows=own.num_rows,
            kv_len=own.end - own.first_page * own.page_size,
            causal=np.ones(len(own.chunk), dtype=np.bool_),
        )

    def where(self, own: ExchangeRows, *, tables: PageTables, device: torch.device) -> KvWrite:
        """Where the rows of the segments `own`, of one row each, are in the workspace."""
        chunk = np.searchsorted(self._chunks, own.chunk)
        column = own.start // own.page_size - self._first_page[chunk]
        return kv_write(tables.host[chunk, column], own.start % own.page_size, device=device)
