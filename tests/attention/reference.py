"""Attention as its definition says, in float64 and one position after another: what the backends are held against."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention.interface import AttentionBackend, AttentionRows, AttentionSpec

MakeBackend = Callable[[AttentionSpec], AttentionBackend]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows to attend with, over a memory whose pages are handed out in no order."""

    spec: AttentionSpec
    rows: list[AttentionRows]
    q: torch.Tensor
    kv: torch.Tensor


def make_spec(
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 4,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> AttentionSpec:
    """A spec on the CPU."""
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        scale=head_dim**-0.5 if scale is None else scale,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def make_case(spec: AttentionSpec, entries: Sequence[tuple[int, int, bool]], *, seed: int = 0) -> Case:
    """A case from entries (num_rows, kv_len, causal); each entry has pages of its own, and no table is sorted."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-kv_len // spec.page_size) for _, kv_len, _ in entries]
    tables = torch.split(torch.randperm(sum(counts) + 3, generator=generator)[: sum(counts)], counts)
    rows = [
        AttentionRows(num_rows=num_rows, kv_len=kv_len, page_table=table.tolist(), causal=causal)
        for (num_rows, kv_len, causal), table in zip(entries, tables, strict=True)
    ]
    shape = (sum(counts) + 3, 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    num_rows = sum(entry.num_rows for entry in rows)
    return Case(
        spec=spec,
        rows=rows,
        q=torch.randn(num_rows, spec.num_heads, spec.head_dim, generator=generator),
        kv=torch.randn(shape, generator=generator),
    )


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, D] and natural log-sum-exp [T, Hq] in float64."""
    output = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full(case.q.shape[:2], -math.inf, dtype=torch.float64)
    first = 0
    for entry in case.rows:
        k, v = (read_positions(case.kv, entry.page_table, kv_len=entry.kv_len, part=part) for part in (0, 1))
        for row in range(entry.num_rows):
            seen = entry.kv_len - entry.num_rows + row + 1 if entry.causal else entry.kv_len
            if seen:
                state = _attend_row(case.q[first + row].double(), k[:, :seen], v[:, :seen], scale=case.spec.scale)
                output[first + row], lse[first + row] = state
        first += entry.num_rows
    return output, lse


def read_positions(kv: torch.Tensor, page_table: Sequence[int], *, kv_len: int, part: int) -> torch.Tensor:
    """K (part 0) or V (part 1) of the first kv_len positions, [Hkv, kv_len, D] in float64."""
    page_size = kv.shape[3]
    positions = [
        kv[page_table[position // page_size], part, :, position % page_size].double() for position in range(kv_len)
    ]
    return torch.stack(positions, dim=1) if positions else kv.new_zeros((kv.shape[2], 0, kv.shape[4])).double()


def _attend_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row q [Hq, D] over k and v [Hkv, L, D]: [Hq, D] and [Hq]."""
    heads = torch.arange(q.shape[0]) // (q.shape[0] // k.shape[0])
    scores = torch.einsum("hd,hld->hl", q, k[heads]) * scale
    return torch.einsum("hl,hld->hd", scores.softmax(dim=1), v[heads]), scores.logsumexp(dim=1)
