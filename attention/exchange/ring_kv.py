"""KV in a ring: blocks of pages go round the cp ranks, the next one under way while attention works on this one.

```
hop 1   rank c receives the pages of c - 1, block by block              own pages ── attend ──┐
hop 2   ...           of c - 2                                          block 1  ── attend ── merge ──┐
                                                                        block 2  (under way)  ...     merge
```
A block holds at most a third of the policy's `max_tokens`: one is worked on while one comes and one goes (ring
attention, arXiv 2310.01889; pass-KV of arXiv 2411.01783). The first block to a rank carries the new K and V that are
computed here for its pages; who attends writes its own ones into the copies that come, which left without them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.exchange.member import CpMember
from attention.exchange.own_writes import plan_own_writes
from attention.exchange.row_packing import RowPacking
from attention.exchange.rows import ExchangeRows, kv_write
from attention.interface import AttentionPlan, AttentionRows, KvWrite, PageTables
from attention.layer_memory import LayerMemory
from parallel.arrays import Bools, Ints
from parallel.exchange_memory import RING_BLOCKS


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows in a block, by their places among this rank's own or in the message, and where they are written."""

    places: torch.Tensor
    where: KvWrite


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One shift: this rank's `pages` and the rows at `sent` go `distance` on; `num_pages` pages come in, and after them
    `taken` rows for this rank's own pages. `patched` are its own rows that belong into the copies; then `plan` works on
    those.
    """

    distance: int
    pages: torch.Tensor
    sent: torch.Tensor
    num_pages: int
    taken: KvWrite
    num_taken: int
    patched: _Rows
    plan: AttentionPlan | None


class RingKv:
    """See Exchange."""

    def __init__(self, rows: ExchangeRows, *, member: CpMember) -> None:
        self._group = member.group
        self._backend = member.backend
        self._device = member.device
        self._rows = rows
        self._own = rows.take(rows.computed_by == member.group.index)
        self._writes = plan_own_writes(rows, cp_rank=member.group.index, device=member.device)
        self._packing = RowPacking(member.backend.spec.page)
        self._at_home = member.backend.plan(rows.tables, self._own.over_pages_of(member.group.index))
        block_pages = max(member.policy.max_tokens // (RING_BLOCKS * rows.page_size), 1)
        self._blocks = list(self._plan_blocks(block_pages))

    def attend(
        self, q: torch.Tensor, planes: Sequence[torch.Tensor], layer: LayerMemory, *, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Exchange."""
        self._writes.write(planes, layer, backend=self._backend)
        following = self._begin(0, planes, layer)
        output, lse = self._at_home.run_with_lse(q, layer)
        for index, block in enumerate(self._blocks):
            received = following()
            following = self._begin(index + 1, planes, layer)
            self._take_rows(block, received, layer)
            if block.plan is not None:
                copies = layer.over(received[: block.num_pages])
                own = [plane.index_select(0, block.patched.places) for plane in planes]
                self._backend.write(copies, own, block.patched.where)
                part, part_lse = block.plan.run_with_lse(q, copies)
                output, lse = self._backend.merge(torch.stack([output, part]), torch.stack([lse, part_lse]))
        return output, lse if with_lse else None

    def _begin(self, index: int, planes: Sequence[torch.Tensor], layer: LayerMemory) -> Callable[[], torch.Tensor]:
        if index == len(self._blocks):
            return lambda: layer.pages
        block, page_bytes = self._blocks[index], layer.pages.shape[1]
        sent = layer.pages.new_empty((len(block.pages) + self._extra(len(block.sent)), page_bytes))
        torch.index_select(layer.pages, 0, block.pages, out=sent[: len(block.pages)])
        if len(block.sent):
            packed = self._packing.pack(planes, block.sent, rows=len(block.sent))
            sent[len(block.pages) :].view(-1)[: packed.numel()] = packed.view(-1)
        received = layer.pages.new_empty((block.num_pages + self._extra(block.num_taken), page_bytes))
        return self._group.begin_shift(sent, received, distance=block.distance)

    def _take_rows(self, block: _Block, received: torch.Tensor, layer: LayerMemory) -> None:
        if block.num_taken:
            size = block.num_taken * self._packing.row_bytes
            packed = received[block.num_pages :].view(-1)[:size].view(block.num_taken, -1)
            self._backend.write(layer, self._packing.unpack(packed), block.taken)

    def _extra(self, num_rows: int) -> int:
        """Pages that as many packed rows take."""
        return -(-num_rows * self._packing.row_bytes // self._backend.spec.page.page_bytes)

    # ---- planning ----

    def _plan_blocks(self, block_pages: int) -> Iterator[_Block]:
        rows, cp, index = self._rows, self._group.size, self._group.index
        contributed = [_Contribution(rows, cp_rank=cp_rank) for cp_rank in range(cp)]
        own_pages = contributed[index].pages(rows.tables)
        for distance in range(1, cp):
            source, target = (index - distance) % cp, (index + distance) % cp
            for first in range(0, max(part.num_pages for part in contributed), block_pages):
                is_first = first == 0
                end = min(first + block_pages, contributed[source].num_pages)
                sent = rows.is_foreign & (rows.stored_by == target) & is_first
                taken = rows.take(rows.is_foreign & (rows.computed_by == source) & (rows.stored_by == index) & is_first)
                yield _Block(
                    distance=distance,
                    pages=torch.from_numpy(own_pages[first : first + block_pages]).to(self._device, non_blocking=True),
                    sent=self._own_places(sent),
                    num_pages=max(end - first, 0),
                    taken=taken.where_stored(device=self._device),
                    num_taken=len(taken.chunk),
                    patched=self._patched(contributed[source], first=first, end=end),
                    plan=self._plan_block(contributed[source], first=first, end=end),
                )

    def _own_places(self, segments: Bools) -> torch.Tensor:
        places = self._rows.row_places(segments, cp_rank=self._group.index)
        return torch.from_numpy(places).to(self._device, non_blocking=True)

    def _patched(self, source: "_Contribution", *, first: int, end: int) -> _Rows:
        """This rank's own rows whose page is among the pages [first, end) of what `source` contributes."""
        rows, index = self._rows, self._group.index
        place = source.last_page_of(rows)
        chosen = (rows.computed_by == index) & rows.is_foreign & (rows.stored_by == source.cp_rank)
        chosen &= (place >= first) & (place < end)
        where = kv_write(place[chosen] - first, rows.start[chosen] % rows.page_size, device=self._device)
        return _Rows(places=self._own_places(chosen), where=where)

    def _plan_block(self, source: "_Contribution", *, first: int, end: int) -> AttentionPlan | None:
        """Attention over the pages [first, end) of what `source` contributes; None where no row sees any of them."""
        own, size = self._own, self._own.page_size
        whole = own.over_pages_of(source.cp_rank)
        base = source.first_page_of(own)
        begin = np.maximum(base, first)
        # What an entry sees of the block ends with the block, or inside the last of its own keys.
        kv_len = np.minimum(whole.kv_len - (begin - base) * size, (end - begin) * size)
        rows = AttentionRows(
            table_row=np.zeros(len(own.chunk), dtype=np.int64),
            first_page=np.maximum(begin - first, 0),
            num_rows=whole.num_rows,
            kv_len=np.maximum(kv_len, 0),
            causal=whole.causal & (kv_len > 0),
        )
        if not (rows.kv_len * rows.num_rows).any():
            return None
        numbers = np.arange(max(end - first, 1), dtype=np.int32)[None]
        return self._backend.plan(PageTables.from_host(numbers, device=self._device), rows)


class _Contribution:
    """What one cp rank sends round: its pages of the chunks of `rows`, chunk by chunk."""

    def __init__(self, rows: ExchangeRows, *, cp_rank: int) -> None:
        self.cp_rank = cp_rank
        self._chunks, first, last = rows.chunk_bounds
        self._slots = rows.slot[first]
        self._skipped = rows.skipped[first, cp_rank]
        self._counts = rows.seen[last, cp_rank] - self._skipped
        self._begins = np.cumsum(self._counts) - self._counts
        self.num_pages = int(self._counts.sum())

    def pages(self, tables: PageTables) -> Ints:
        """Their numbers, by the tables of that rank."""
        places = zip(self._slots, self._skipped, self._counts, strict=True)
        parts = [tables.host[slot, first : first + count] for slot, first, count in places]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)

    def first_page_of(self, rows: ExchangeRows) -> Ints:
        """Of each segment, where the first page that it sees stands in all."""
        chunk = np.searchsorted(self._chunks, rows.chunk)
        place: Ints = self._begins[chunk] + rows.skipped[:, self.cp_rank] - self._skipped[chunk]
        return place

    def last_page_of(self, rows: ExchangeRows) -> Ints:
        """Of each segment, where the last page that it sees stands in all."""
        return self.first_page_of(rows) + rows.seen[:, self.cp_rank] - rows.skipped[:, self.cp_rank] - 1
