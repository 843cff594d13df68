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

    def run(
        self, q: torch.Tensor, kv: torch.Tensor, output: torch.Tensor, *, scale: float, scratch: Scratch
    ) -> torch.Tensor:
        """Writes its rows of output [T, Hq, D]; returns their log-sum-exp [num_rows, Hq]."""
        num_kv_heads, head_dim = kv.shape[2], kv.shape[4]
        pages = scratch.gather(kv.view(-1, kv.shape[3] * head_dim), self.page_rows)
        k, v = pages.view(2, num_kv_heads, -1, head_dim)[:, :, : self.kv_len]
        rows = slice(self.start, self.start + self.num_rows)
        q_heads = _by_kv_head(q[rows], num_kv_heads).permute(1, 2, 0, 3)
        target = _by_kv_head(output[rows], num_kv_heads)
        lses = []
        for first in range(0, self.num_rows, QUERY_BLOCK):
            block = slice(first, min(first + QUERY_BLOCK, self.num_rows))
            part, lse = self._attend_block(q_heads[:, :, block], k, v, first=first, scale=scale)
            target[block] = part.permute(2, 0, 1, 3)
            lses.append(lse.permute(2, 0, 1).flatten(1))
        return torch.cat(lses)

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
