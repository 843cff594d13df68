"""Long runs of query rows of one sequence on the torch backend: a prompt's chunk.

    keys      0 .............. b ....... e .............. kv_len
    rows      [   all see     |  square  ]                         one query block, its own keys are [b, e)

The kernel masks from the top left, so a block is a full pass over the keys before it and a causal square over its own,
merged by log-sum-exp. The matrix of scores is never whole in memory.
"""

from dataclasses import dataclass

import numpy as np
import torch

from attention.dense import State, attend
from attention.interface import AttentionRows, AttentionSpec
from attention.merging import merge_pair
from attention.scratch import Scratch

QUERY_BLOCK = 256
"""Rows of one square: the fused kernel works on a whole square although half is masked, and 256 of 512 rows took
8 to 20% less time than one square of 512; 128 lost that again on long contexts."""


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """One entry of a plan: rows [start, start + num_rows) of q over the pages that `page_rows` addresses."""

    start: int
    num_rows: int
    kv_len: int
    causal: bool
    page_rows: torch.Tensor
    """int64 [2 * Hkv * pages], on the device: rows of the memory seen as [N * 2 * Hkv, P * D], K's heads, then V's."""

    def run_into(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        *,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        scale: float,
        scratch: Scratch,
    ) -> None:
        """Writes its rows of output [T, Hq, D] and, where given, of lse [T, Hq]."""
        k, v = self._gather(kv, scratch=scratch)
        q_heads, output_heads = _by_kv_head(q, kv.shape[2]), _by_kv_head(output, kv.shape[2])
        for first in range(0, self.num_rows, QUERY_BLOCK):
            rows = slice(self.start + first, self.start + min(first + QUERY_BLOCK, self.num_rows))
            block = q_heads[rows].permute(1, 2, 0, 3)
            part, part_lse = self._attend_block(block, k, v, first=first, scale=scale)
            output_heads[rows] = part.permute(2, 0, 1, 3)
            if lse is not None:
                lse[rows] = part_lse.permute(2, 0, 1).flatten(1)

    def _gather(self, kv: torch.Tensor, *, scratch: Scratch) -> torch.Tensor:
        """K and V as [2, Hkv, kv_len, D]."""
        _, _, num_kv_heads, page_size, head_dim = kv.shape
        gathered = scratch.take((len(self.page_rows), page_size * head_dim))
        torch.index_select(kv.view(-1, page_size * head_dim), 0, self.page_rows, out=gathered)
        return gathered.view(2, num_kv_heads, -1, head_dim)[:, :, : self.kv_len]

    def _attend_block(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, first: int, scale: float) -> State:
        if not self.causal:
            return attend(q, k, v, scale=scale, causal=False)
        begin = self.kv_len - self.num_rows + first
        own = slice(begin, begin + q.shape[2])
        square = attend(q, k[:, own], v[:, own], scale=scale, causal=True)
        if begin == 0:
            return square
        return merge_pair(square, attend(q, k[:, :begin], v[:, :begin], scale=scale, causal=False))


def _by_kv_head(heads: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, Hq, D] as a view [T, Hkv, G, D]."""
    return heads.view(heads.shape[0], num_kv_heads, -1, heads.shape[2])


def plan_block_rows(entry: AttentionRows, *, start: int, spec: AttentionSpec) -> BlockRows:
    """Plans one entry with at least one row and one key; `start` is its first row in q."""
    pages = np.asarray(entry.page_table, dtype=np.int64)
    heads = np.arange(2 * spec.num_kv_heads, dtype=np.int64)
    page_rows = pages[None, :] * (2 * spec.num_kv_heads) + heads[:, None]
    return BlockRows(
        start=start,
        num_rows=entry.num_rows,
        kv_len=entry.kv_len,
        causal=entry.causal,
        page_rows=torch.from_numpy(page_rows.ravel()).to(spec.device),
    )
