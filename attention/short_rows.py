"""Entries of a few query rows each on the torch backend: decode, and whatever else is a few tokens long.

Sequences of like length are one batch: their pages are gathered into [B, Hkv, L, D] and the query heads of a KV head
are the rows of one batched matrix product with it. Gathered K and scores are small enough to stay in cache; V takes
the place of K. The fused kernel was 10 to 40% slower here than the two products.
Shapes: B sequences of a batch, R query rows of each, S short rows of a plan, H KV heads, G query heads of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from attention.batching import plan_batches
from attention.interface import AttentionRows, AttentionSpec
from attention.scratch import Scratch

MAX_SHORT_ROWS = 8
BATCH_BYTES = 3 << 20
"""Gathered K of one batch: 1.5 to 3 MiB were fastest at every batch and context, at all sizes tried from 0.4 to 25."""
PADDING_BYTES = 256 << 10
"""Copying this much costs what one more batch costs in calls, about 30 µs."""


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """B sequences of R rows each, padded to L positions; its rows are consecutive among the plan's short rows."""

    num_sequences: int
    num_rows: int
    num_kv_heads: int
    key_rows: torch.Tensor
    """int64 [B * H * pages], on the device: K's rows of the memory seen as [N * 2 * H, P * D]."""
    value_rows: torch.Tensor
    gathered: torch.Tensor
    """Scratch [B * H * pages, P * D]."""
    by_head: torch.Tensor
    """The same memory as [B * H, L, D]."""
    mask: torch.Tensor | None
    """bool [B, 1, R, 1, M]: of the last M of the L positions those hidden from a row; none where all see all."""

    def run(
        self, q: torch.Tensor, pages: torch.Tensor, *, scale: float, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with q [B * R, Hq, D] over the memory `pages` [N * 2 * H, P * D].

        Returns an output as q and, where asked, the log-sum-exp [B * R, Hq]; both in float32 or better.
        """
        scores = self._scores(q, pages, scale=scale)
        largest = scores.amax(dim=-1, keepdim=True) if with_lse else None
        weights = torch.softmax(scores, dim=-1, out=scores)
        output = self._by_row(torch.bmm(weights, self._gather(pages, self.value_rows).to(weights.dtype)))
        if largest is None:
            return output, None
        # The largest weight is exp(largest score - log-sum-exp).
        return output, self._by_row(largest - weights.amax(dim=-1, keepdim=True).log_()).squeeze(-1)

    def _scores(self, q: torch.Tensor, pages: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Masked and scaled scores [B * H, R * G, L]."""
        queries = self._by_kv_head(q).to(torch.promote_types(q.dtype, torch.float32))
        k = self._gather(pages, self.key_rows).to(queries.dtype)
        scores = queries.new_empty((*queries.shape[:2], k.shape[1]))
        torch.baddbmm(scores, queries, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if self.mask is not None:
            per_row = scores.view(self.num_sequences, self.num_kv_heads, self.num_rows, -1, k.shape[1])
            # Selected, not added to: what is hidden may be NaN.
            per_row[..., -self.mask.shape[-1] :].masked_fill_(self.mask, -math.inf)
        return scores

    def _gather(self, pages: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """K or V as [B * H, L, D]; overwrites what was gathered before."""
        torch.index_select(pages, 0, rows, out=self.gathered)
        return self.by_head

    def _by_kv_head(self, values: torch.Tensor) -> torch.Tensor:
        """From [B * R, H * G, D] to [B * H, R * G, D]."""
        split = values.view(self.num_sequences, self.num_rows, self.num_kv_heads, -1, values.shape[2])
        return split.transpose(1, 2).reshape(self.num_sequences * self.num_kv_heads, -1, values.shape[2])

    def _by_row(self, values: torch.Tensor) -> torch.Tensor:
        """From [B * H, R * G, D] to [B * R, H * G, D]."""
        split = values.view(self.num_sequences, self.num_kv_heads, self.num_rows, -1, values.shape[2])
        return split.transpose(1, 2).reshape(self.num_sequences * self.num_rows, -1, values.shape[2])


@dataclass(frozen=True, kw_only=True)
class ShortRows:
    """All short entries of a plan."""

    batches: Sequence[RowBatch]
    order: torch.Tensor | None
    """int64 [S]: the rows of q, batch after batch; none where that is all of q as it stands."""

    def run(
        self, q: torch.Tensor, kv: torch.Tensor, *, scale: float, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with the short rows of q [T, Hq, D]: [S, Hq, D] and, where asked, [S, Hq], batch after batch."""
        pages = kv.view(-1, kv.shape[3] * kv.shape[4])
        rows = q if self.order is None else q.index_select(0, self.order)
        states, first = [], 0
        for batch in self.batches:
            last = first + batch.num_sequences * batch.num_rows
            states.append(batch.run(rows[first:last], pages, scale=scale, with_lse=with_lse))
            first = last
        lses = [lse for _, lse in states if lse is not None]
        return _joined([output for output, _ in states]).to(q.dtype), _joined(lses).float() if with_lse else None

    def run_into(
        self, q: torch.Tensor, kv: torch.Tensor, *, output: torch.Tensor, lse: torch.Tensor | None, scale: float
    ) -> None:
        """Writes the short rows of output [T, Hq, D] and, where given, of lse [T, Hq]."""
        assert self.order is not None
        part, part_lse = self.run(q, kv, scale=scale, with_lse=lse is not None)
        output.index_copy_(0, self.order, part)
        if lse is not None and part_lse is not None:
            lse.index_copy_(0, self.order, part_lse)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def plan_short_rows(
    entries: Sequence[tuple[int, AttentionRows]], *, total_rows: int, spec: AttentionSpec, scratch: Scratch
) -> ShortRows:
    """Plans entries, each with its first row in q, at least one row and at least one key."""
    page_bytes = spec.num_kv_heads * spec.page_size * spec.head_dim * spec.dtype.itemsize
    batches, order = [], []
    by_rows = sorted(entries, key=lambda entry: entry[1].num_rows)
    for num_rows, group in groupby(by_rows, key=lambda entry: entry[1].num_rows):
        alike = list(group)
        for batch in plan_batches(
            [len(entry.page_table) for _, entry in alike],
            max_batch_pages=BATCH_BYTES // page_bytes,
            max_padding_pages=PADDING_BYTES // page_bytes,
        ):
            batches.append(_plan_batch([alike[index][1] for index in batch], spec=spec, scratch=scratch))
            order.append(np.asarray([alike[index][0] for index in batch])[:, None] + np.arange(num_rows))
    rows = np.concatenate([part.ravel() for part in order])
    as_it_stands = np.array_equal(rows, np.arange(total_rows))
    return ShortRows(batches=batches, order=None if as_it_stands else torch.from_numpy(rows).to(spec.device))


def _plan_batch(entries: Sequence[AttentionRows], *, spec: AttentionSpec, scratch: Scratch) -> RowBatch:
    """Plans entries of equally many rows as one padded batch."""
    tables = _padded_tables(entries)
    heads = np.arange(spec.num_kv_heads, dtype=np.int64)
    key_rows = (tables[:, None, :] * (2 * spec.num_kv_heads) + heads[:, None]).ravel()
    kv_len = max(entry.kv_len for entry in entries)
    mask = _plan_mask(entries, kv_len=kv_len)
    gathered = scratch.take((len(key_rows), spec.page_size * spec.head_dim))
    return RowBatch(
        num_sequences=len(entries),
        num_rows=entries[0].num_rows,
        num_kv_heads=spec.num_kv_heads,
        key_rows=torch.from_numpy(key_rows).to(spec.device),
        value_rows=torch.from_numpy(key_rows + spec.num_kv_heads).to(spec.device),
        gathered=gathered,
        by_head=gathered.view(len(entries) * spec.num_kv_heads, -1, spec.head_dim)[:, :kv_len],
        mask=None if mask is None else torch.from_numpy(mask).to(spec.device),
    )


def _padded_tables(entries: Sequence[AttentionRows]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Page tables as one int64 [B, pages]; a shorter one repeats its last page, whose values are numbers."""
    padded = np.empty((len(entries), max(len(entry.page_table) for entry in entries)), dtype=np.int64)
    for row, entry in zip(padded, entries, strict=True):
        row[: len(entry.page_table)] = entry.page_table
        row[len(entry.page_table) :] = entry.page_table[-1]
    return padded


def _plan_mask(
    entries: Sequence[AttentionRows], *, kv_len: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None:
    """What hides the end of the KV from some rows: [B, 1, R, 1, M] for the last M positions, or none."""
    num_rows = entries[0].num_rows
    hidden = np.asarray([num_rows - 1 if entry.causal else 0 for entry in entries])[:, None]
    ahead = np.maximum(hidden - np.arange(num_rows), 0)
    visible = np.asarray([entry.kv_len for entry in entries])[:, None] - ahead
    positions = np.arange(visible.min(), kv_len)
    if not len(positions):
        return None
    is_hidden: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = positions >= visible[:, :, None]
    return is_hidden[:, None, :, None, :]
