"""Attention as its definition says, in float64 and one position after another: what the backends are held against."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from attention.interface import AttentionBackend, AttentionRows, AttentionSpec, PageTables
from attention.layer_memory import LayerFormat, LayerMemory, bind_layer
from parallel.storage import EVERYTHING, PageLayout, Plane, PlaneView, keys_and_values, lay_out_page

MakeBackend = Callable[[AttentionSpec], AttentionBackend]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows to attend with, over a memory whose pages are handed out in no order."""

    spec: AttentionSpec
    tables: PageTables
    rows: AttentionRows
    q: torch.Tensor
    layer: LayerMemory
    lists: torch.Tensor | None = None


def make_spec(
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 4,
    window: int = 0,
    dtype: str = "float32",
    lay_out: Callable[[PageLayout], PageLayout] = lambda page: page,
) -> AttentionSpec:
    """A spec of keys and values on the CPU; `lay_out` may lay its page out in another way."""
    group = keys_and_values("full", layers=(0,), sees=EVERYTHING, num_kv_heads=num_kv_heads, head_size=head_dim)
    page = lay_out_page(group.planes, page_size=page_size, num_heads=num_kv_heads, dtype=dtype)
    return AttentionSpec(
        num_heads=num_heads,
        page=lay_out(page),
        key=group.key,
        value=group.value,
        window=window,
        device=torch.device("cpu"),
    )


def latent_spec(*, window: int = 0, listed: int = 0, lay_out: Callable[[PageLayout], PageLayout]) -> AttentionSpec:
    """One plane of 24 values that 4 query heads share, the first 16 of which are the value."""
    plane = Plane(name="latent", elements=24, per_head=False)
    page = lay_out_page([plane], page_size=4, num_heads=1, dtype="float32")
    return AttentionSpec(
        num_heads=4,
        page=lay_out(page),
        key=PlaneView(plane="latent", offset=0, width=24),
        value=PlaneView(plane="latent", offset=0, width=16),
        window=window,
        listed=listed,
        device=torch.device("cpu"),
    )


def positions_apart(page: PageLayout) -> PageLayout:
    """Positions outermost, an odd number of bytes between them, and a page that is longer than what is in it."""
    planes, offset = [], 0
    for plane in page.planes:
        step = plane.num_heads * plane.run_bytes + 3 * plane.itemsize
        planes.append(replace(plane, offset=offset, head_stride=plane.run_bytes, position_stride=step))
        offset += page.page_size * step
    return replace(page, planes=tuple(planes), page_bytes=-(-(offset + 40) // 16) * 16)


def make_case(
    spec: AttentionSpec, entries: Sequence[tuple[int, int, bool]], *, seed: int = 0, scale: float | None = None
) -> Case:
    """A case from entries (num_rows, kv_len, causal); each has pages of its own, which begin at any column."""
    generator = torch.Generator().manual_seed(seed)
    source = np.random.default_rng(seed)
    counts = [-(-kv_len // spec.page_size) for _, kv_len, _ in entries]
    pages = torch.randperm(sum(counts) + 3, generator=generator).numpy().astype(np.int32)
    first = source.integers(0, 3, len(entries))
    host = np.full((len(entries) + 1, max(counts, default=0) + 3), -1, dtype=np.int32)
    table_row = source.permutation(len(entries) + 1)[: len(entries)]
    for row, column, count, begin in zip(table_row, first, counts, np.cumsum([0, *counts]), strict=False):
        host[row, column : column + count] = pages[begin : begin + count]
    num_rows, kv_len, causal = (np.array([entry[index] for entry in entries]) for index in range(3))
    rows = AttentionRows(
        table_row=table_row.astype(np.int64),
        first_page=first.astype(np.int64),
        num_rows=num_rows.astype(np.int64),
        kv_len=kv_len.astype(np.int64),
        causal=causal.astype(np.bool_),
    )
    total = int(rows.num_rows.sum())
    return Case(
        spec=spec,
        tables=PageTables.from_host(host, device=spec.device),
        rows=rows,
        q=torch.randn(total, spec.num_heads, spec.key.width, generator=generator),
        layer=make_layer(spec, num_pages=len(pages), generator=generator, scale=scale),
    )


def make_layer(
    spec: AttentionSpec, *, num_pages: int, generator: torch.Generator, scale: float | None = None
) -> LayerMemory:
    """A layer's memory with numbers in its planes, and noise in between."""
    form = LayerFormat(
        page=spec.page, key=spec.key, value=spec.value, scale=spec.key.width**-0.5 if scale is None else scale
    )
    noise = torch.randint(0, 256, (num_pages, spec.page.page_bytes), generator=generator, dtype=torch.uint8)
    layer = bind_layer(noise, form)
    for plane in layer.planes:
        plane.copy_(torch.randn(plane.shape, generator=generator))
    return layer


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, Hq, Dv] and natural log-sum-exp [T, Hq] in float64."""
    output = torch.zeros((*case.q.shape[:2], case.spec.value.width), dtype=torch.float64)
    lse = torch.full(case.q.shape[:2], -math.inf, dtype=torch.float64)
    row = 0
    for entry in range(len(case.rows)):
        for index in range(int(case.rows.num_rows[entry])):
            seen = _seen(case, entry, index, row)
            if seen:
                k, v = (_read(case, view, entry, seen) for view in (case.layer.key, case.layer.value))
                output[row], lse[row] = _attend_row(case.q[row].double(), k, v, scale=case.layer.scale)
            row += 1
    return output, lse


def _seen(case: Case, entry: int, index: int, row: int) -> list[int]:
    """The keys of its entry that a row sees."""
    if case.lists is not None:
        return [key for key in case.lists[row].tolist() if key >= 0]
    kv_len = int(case.rows.kv_len[entry])
    if not case.rows.causal[entry]:
        return list(range(kv_len))
    end = kv_len - int(case.rows.num_rows[entry]) + index + 1
    return list(range(max(end - case.spec.window, 0) if case.spec.window else 0, end))


def page_of(case: Case, entry: int, position: int) -> int:
    """The page that holds a key of an entry."""
    column = int(case.rows.first_page[entry]) + position // case.spec.page_size
    return int(case.tables.host[case.rows.table_row[entry], column])


def _read(case: Case, view: torch.Tensor, entry: int, seen: Sequence[int]) -> torch.Tensor:
    """Keys or values [Hkv, len(seen), D] in float64."""
    size = case.spec.page_size
    return torch.stack([view[page_of(case, entry, key), :, key % size].double() for key in seen], dim=1)


def _attend_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row q [Hq, Dk] over k [Hkv, L, Dk] and v [Hkv, L, Dv]: [Hq, Dv] and [Hq]."""
    heads = torch.arange(q.shape[0]) // (q.shape[0] // k.shape[0])
    scores = torch.einsum("hd,hld->hl", q, k[heads]) * scale
    return torch.einsum("hl,hld->hd", scores.softmax(dim=1), v[heads]), scores.logsumexp(dim=1)
