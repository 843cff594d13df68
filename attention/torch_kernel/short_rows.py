"""Entries of a few query rows each on the torch backend: decode, and whatever else is a few tokens long.

Sequences of like length are one batch: their pages are gathered into [B, Hkv, L, D] and the query heads of a KV head
are the rows of one batched matrix product with it. Gathered K and scores are small enough to stay in cache; V takes
the place of K, unless it lies in the same plane. The fused kernel was 10 to 40% slower here than the two products.
Shapes: B sequences of a batch, R query rows of each, S short rows of a plan, H KV heads, G query heads of each, L
positions of the longest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.interface import AttentionRows, AttentionSpec, PageTables
from attention.layer_memory import LayerMemory
from attention.plane_rows import PlaneRows
from attention.torch_kernel.batching import plan_batches
from attention.torch_kernel.scratch import Scratch
from parallel.arrays import Bools, Ints
from parallel.storage import PlaneView

BATCH_BYTES = 3 << 20
"""Gathered K of one batch: 1.5 to 3 MiB were fastest at every batch and context, at all sizes tried from 0.4 to 25."""
PADDING_BYTES = 256 << 10
"""Copying this much costs what one more batch costs in calls, about 30 µs."""


@dataclass(frozen=True, kw_only=True)
class PlaneGather:
    """One plane of a batch's pages, copied into scratch that the batch's other plane uses too."""

    plane: str
    index: torch.Tensor
    """int64, on the device."""
    gathered: torch.Tensor
    """Scratch [len(index), row elements]."""
    by_head: torch.Tensor
    """The same memory as [B * H, L, elements]."""

    def fill(self, layer: LayerMemory) -> None:
        """Gathers out of a layer's memory."""
        torch.index_select(layer.runs[self.plane], 0, self.index, out=self.gathered)

    def view(self, of: PlaneView) -> torch.Tensor:
        """What is gathered, as [B * H, L, width] of a key or a value."""
        part: torch.Tensor = self.by_head.narrow(2, of.offset, of.width)
        return part


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """B sequences of R rows each, padded to L positions; its rows are consecutive among the plan's short rows."""

    num_sequences: int
    num_rows: int
    spec: AttentionSpec
    key: PlaneGather
    value: PlaneGather | None
    """None where it lies in the key's plane."""
    keys: torch.Tensor
    """[B * H, L, Dk], of what `key` gathers."""
    values: torch.Tensor
    """[B * H, L, Dv], of what `value` gathers, over the keys where that is another plane."""
    mask: torch.Tensor | None
    """bool [B, 1, R, 1, M]: of the last M of the L positions those hidden from a row; none where all see all."""

    def run(self, q: torch.Tensor, layer: LayerMemory, *, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with q [B * R, Hq, Dk] over a layer's memory.

        Returns an output [B * R, Hq, Dv] and, where asked, the log-sum-exp [B * R, Hq]; both in float32 or better.
        """
        scores = self._scores(q, layer)
        largest = scores.amax(dim=-1, keepdim=True) if with_lse else None
        weights = torch.softmax(scores, dim=-1, out=scores)
        if self.value is not None:
            self.value.fill(layer)
        output = self._by_row(torch.bmm(weights, self.values.to(weights.dtype)))
        if largest is None:
            return output, None
        # The largest weight is exp(largest score - log-sum-exp).
        return output, self._by_row(largest - weights.amax(dim=-1, keepdim=True).log_()).squeeze(-1)

    def _scores(self, q: torch.Tensor, layer: LayerMemory) -> torch.Tensor:
        """Masked and scaled scores [B * H, R * G, L]."""
        queries = self._by_kv_head(q).to(torch.promote_types(q.dtype, torch.float32))
        self.key.fill(layer)
        k = self.keys.to(queries.dtype)
        scores = queries.new_empty((*queries.shape[:2], k.shape[1]))
        torch.baddbmm(scores, queries, k.transpose(1, 2), beta=0, alpha=layer.scale, out=scores)
        if self.mask is not None:
            per_row = scores.view(self.num_sequences, self.spec.num_kv_heads, self.num_rows, -1, k.shape[1])
            # Selected, not added to: what is hidden may be NaN.
            per_row[..., -self.mask.shape[-1] :].masked_fill_(self.mask, -math.inf)
        return scores

    def _by_kv_head(self, values: torch.Tensor) -> torch.Tensor:
        """From [B * R, H * G, D] to [B * H, R * G, D]."""
        heads = self.spec.num_kv_heads
        split = values.view(self.num_sequences, self.num_rows, heads, -1, values.shape[2])
        return split.transpose(1, 2).reshape(self.num_sequences * heads, -1, values.shape[2])

    def _by_row(self, values: torch.Tensor) -> torch.Tensor:
        """From [B * H, R * G, D] to [B * R, H * G, D]."""
        heads = self.spec.num_kv_heads
        split = values.view(self.num_sequences, heads, self.num_rows, -1, values.shape[2])
        return split.transpose(1, 2).reshape(self.num_sequences * self.num_rows, -1, values.shape[2])


@dataclass(frozen=True, kw_only=True)
class ShortRows:
    """All short entries of a plan."""

    batches: Sequence[RowBatch]
    order: torch.Tensor | None
    """int64 [S]: the rows of q, batch after batch; none where that is all of q as it stands."""

    def run(self, q: torch.Tensor, layer: LayerMemory, *, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with the short rows of q [T, Hq, Dk]: [S, Hq, Dv] and, where asked, [S, Hq], batch after batch."""
        rows = q if self.order is None else q.index_select(0, self.order)
        states, first = [], 0
        for batch in self.batches:
            last = first + batch.num_sequences * batch.num_rows
            states.append(batch.run(rows[first:last], layer, with_lse=with_lse))
            first = last
        lses = [lse for _, lse in states if lse is not None]
        return _joined([output for output, _ in states]).to(q.dtype), _joined(lses).float() if with_lse else None

    def run_into(self, q: torch.Tensor, layer: LayerMemory, *, output: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Writes the short rows of output [T, Hq, Dv] and, where given, of lse [T, Hq]."""
        assert self.order is not None
        part, part_lse = self.run(q, layer, with_lse=lse is not None)
        output.index_copy_(0, self.order, part)
        if lse is not None and part_lse is not None:
            lse.index_copy_(0, self.order, part_lse)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def plan_short_rows(
    tables: PageTables, rows: AttentionRows, *, starts: Ints, total_rows: int, spec: AttentionSpec, scratch: Scratch
) -> ShortRows:
    """Plans entries with at least one row and one key each; `starts` [E] are their first rows in q."""
    num_pages = -(-rows.kv_len // spec.page_size)
    key = spec.page.plane(spec.key.plane)
    page_bytes = key.num_heads * spec.page_size * key.run_bytes
    batches, order = [], []
    for num_rows in np.unique(rows.num_rows):
        alike = np.flatnonzero(rows.num_rows == num_rows)
        for batch in plan_batches(
            num_pages[alike].tolist(),
            max_batch_pages=BATCH_BYTES // page_bytes,
            max_padding_pages=PADDING_BYTES // page_bytes,
        ):
            chosen = alike[batch]
            batches.append(_plan_batch(tables, rows.take(chosen), spec=spec, scratch=scratch))
            order.append(starts[chosen][:, None] + np.arange(num_rows))
    flat = np.concatenate([part.ravel() for part in order])
    as_it_stands = np.array_equal(flat, np.arange(total_rows))
    return ShortRows(
        batches=batches, order=None if as_it_stands else torch.from_numpy(flat).to(spec.device, non_blocking=True)
    )


def _plan_batch(tables: PageTables, rows: AttentionRows, *, spec: AttentionSpec, scratch: Scratch) -> RowBatch:
    """Plans entries of equally many rows as one padded batch."""
    pages = _padded_tables(tables, rows, page_size=spec.page_size)
    kv_len = int(rows.kv_len.max())
    mask = _plan_mask(rows, kv_len=kv_len, window=spec.window)
    key = _plan_gather(spec.key.plane, pages, kv_len=kv_len, spec=spec, scratch=scratch)
    value = None
    if spec.value.plane != spec.key.plane:
        value = _plan_gather(spec.value.plane, pages, kv_len=kv_len, spec=spec, scratch=scratch)
    return RowBatch(
        num_sequences=len(rows),
        num_rows=int(rows.num_rows[0]),
        spec=spec,
        key=key,
        value=value,
        keys=key.view(spec.key),
        values=(value or key).view(spec.value),
        mask=None if mask is None else torch.from_numpy(mask).to(spec.device, non_blocking=True),
    )


def _plan_gather(name: str, pages: Ints, *, kv_len: int, spec: AttentionSpec, scratch: Scratch) -> PlaneGather:
    plane = PlaneRows(spec.page.plane(name), spec.page)
    index = plane.index(pages)
    gathered = scratch.take((len(index), plane.row_elements))
    heads = len(pages) * plane.plane.num_heads
    return PlaneGather(
        plane=name,
        index=torch.from_numpy(index).to(spec.device, non_blocking=True),
        gathered=gathered,
        by_head=gathered.view(heads, -1, plane.plane.elements)[:, :kv_len],
    )


def _padded_tables(tables: PageTables, rows: AttentionRows, *, page_size: int) -> Ints:
    """The entries' pages as one int64 [B, pages]; a shorter one repeats its last page, whose values are numbers."""
    last = -(-rows.kv_len // page_size) - 1
    columns = np.minimum(np.arange(last.max() + 1), last[:, None]) + rows.first_page[:, None]
    return tables.host[rows.table_row[:, None], columns].astype(np.int64)


def _plan_mask(rows: AttentionRows, *, kv_len: int, window: int) -> Bools | None:
    """What hides keys from some rows: [B, 1, R, 1, M] for the last M positions, or none."""
    num_rows = int(rows.num_rows[0])
    ahead = np.where(rows.causal[:, None], np.maximum(num_rows - 1 - np.arange(num_rows), 0), 0)
    visible = rows.kv_len[:, None] - ahead
    behind = np.where(rows.causal[:, None], np.maximum(visible - window, 0), 0) if window else np.zeros_like(visible)
    positions = np.arange(0 if behind.any() else visible.min(), kv_len)
    if not len(positions):
        return None
    is_hidden: Bools = (positions >= visible[:, :, None]) | (positions < behind[:, :, None])
    return is_hidden[:, None, :, None, :]
