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
    rows_per_sequence: int
    kv_len: int
    key_rows: torch.Tensor
    """int64 [B * H * pages], on the device: K's rows of the memory seen as [N * 2 * H, P * D]."""
    value_rows: torch.Tensor
    mask: torch.Tensor | None
    """[B, 1, R, 1, M]: 0 or -inf on the last M of the L positions; none where every row sees all."""

    def run(
        self, q: torch.Tensor, kv: torch.Tensor, *, scale: float, scratch: Scratch, with_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of q [B * R, Hq, D]: that shape, and where asked its log-sum-exp [B * R, Hq]; float32 or better."""
        num_kv_heads, head_dim = kv.shape[2], kv.shape[4]
        q_heads = q.view(self.num_sequences, -1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim).transpose(1, 2)
        scores = self._scores(q_heads, kv, scale=scale, scratch=scratch)
        lse = scores.logsumexp(dim=-1) if with_lse else None
        torch.softmax(scores, dim=-1, out=scores)
        output = scores @ self._gather(kv, self.value_rows, scratch=scratch, dtype=scores.dtype)
        return _by_row(output, q_heads.shape), None if lse is None else _by_row(lse, q_heads.shape[:-1])

    def _scores(self, q: torch.Tensor, kv: torch.Tensor, *, scale: float, scratch: Scratch) -> torch.Tensor:
        """Masked and scaled scores of q [B, H, R, G, D]: [B * H, R * G, L]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        queries = q.to(wide).reshape(q.shape[0] * q.shape[1], -1, q.shape[4])
        k = self._gather(kv, self.key_rows, scratch=scratch, dtype=wide)
        scores = queries.new_empty((*queries.shape[:2], self.kv_len))
        torch.baddbmm(scores, queries, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if self.mask is not None:
            scores.view(*q.shape[:-1], self.kv_len)[..., -self.mask.shape[-1] :].add_(self.mask)
        return scores

    def _gather(self, kv: torch.Tensor, rows: torch.Tensor, *, scratch: Scratch, dtype: torch.dtype) -> torch.Tensor:
        """K or V as [B * H, L, D]; overwrites what was gathered before."""
        pages = scratch.gather(kv.view(-1, kv.shape[3] * kv.shape[4]), rows)
        return pages.view(self.num_sequences * kv.shape[2], -1, kv.shape[4])[:, : self.kv_len].to(dtype)


def _by_row(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """From [B * H, R * G, ...] to [B * R, H * G, ...]; `shape` is [B, H, R, G, ...]."""
    return values.view(*shape).transpose(1, 2).reshape(-1, shape[1] * shape[3], *shape[4:])


@dataclass(frozen=True, kw_only=True)
class ShortRows:
    """All short entries of a plan."""

    batches: Sequence[RowBatch]
    order: torch.Tensor | None
    """int64 [S]: the rows of q, batch after batch; none where that is q as it stands."""

    def run(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        *,
        scale: float,
        scratch: Scratch,
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Writes the short rows of output [T, Hq, D] and, where given, of lse [T, Hq]."""
        rows = q if self.order is None else q.index_select(0, self.order)
        parts = torch.split(rows, [batch.num_sequences * batch.rows_per_sequence for batch in self.batches])
        states = [
            batch.run(part, kv, scale=scale, scratch=scratch, with_lse=lse is not None)
            for batch, part in zip(self.batches, parts, strict=True)
        ]
        self._place([part for part, _ in states], output)
        if lse is not None:
            self._place([part for _, part in states if part is not None], lse)

    def _place(self, parts: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        values = (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to(target.dtype)
        if self.order is None:
            target.copy_(values)
        else:
            target.index_copy_(0, self.order, values)


def plan_short_rows(entries: Sequence[tuple[int, AttentionRows]], *, total_rows: int, spec: AttentionSpec) -> ShortRows:
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
            batches.append(_plan_batch([alike[index][1] for index in batch], spec=spec))
            order.append(np.asarray([alike[index][0] for index in batch])[:, None] + np.arange(num_rows))
    rows = np.concatenate([part.ravel() for part in order])
    as_it_stands = np.array_equal(rows, np.arange(total_rows))
    return ShortRows(batches=batches, order=None if as_it_stands else torch.from_numpy(rows).to(spec.device))


def _plan_batch(entries: Sequence[AttentionRows], *, spec: AttentionSpec) -> RowBatch:
    """Plans entries of equally many rows as one padded batch."""
    pages = _padded_tables(entries)
    heads = np.arange(spec.num_kv_heads, dtype=np.int64)
    key_rows = (pages[:, None, :] * (2 * spec.num_kv_heads) + heads[:, None]).ravel()
    kv_len = max(entry.kv_len for entry in entries)
    mask = _plan_mask(entries, kv_len=kv_len)
    return RowBatch(
        num_sequences=len(entries),
        rows_per_sequence=entries[0].num_rows,
        kv_len=kv_len,
        key_rows=torch.from_numpy(key_rows).to(spec.device),
        value_rows=torch.from_numpy(key_rows + spec.num_kv_heads).to(spec.device),
        mask=None if mask is None else torch.from_numpy(mask).to(spec.device),
    )


def _padded_tables(entries: Sequence[AttentionRows]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Page tables as one int64 [B, pages]; a shorter one repeats its last page, which holds its own finite numbers."""
    padded = np.empty((len(entries), max(len(entry.page_table) for entry in entries)), dtype=np.int64)
    for row, entry in zip(padded, entries, strict=True):
        row[: len(entry.page_table)] = entry.page_table
        row[len(entry.page_table) :] = entry.page_table[-1]
    return padded


def _plan_mask(
    entries: Sequence[AttentionRows], *, kv_len: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
    """What hides the end of the KV from some rows: [B, 1, R, 1, M] for the last M positions, or none."""
    num_rows = entries[0].num_rows
    hidden = np.asarray([num_rows - 1 if entry.causal else 0 for entry in entries])[:, None]
    ahead = np.maximum(hidden - np.arange(num_rows), 0)
    visible = np.asarray([entry.kv_len for entry in entries])[:, None] - ahead
    positions = np.arange(visible.min(), kv_len)
    if not len(positions):
        return None
    mask = np.where(positions < visible[:, :, None], 0.0, -math.inf).astype(np.float32)
    return mask[:, None, :, None, :]
