"""Pages of many sequences in one list: joined on the host and on the device alike."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.flashinfer_kernel.page_tables import IndexBuffer, join_on_device, join_on_host, join_tables
from attention.interface import AttentionRows, PageTables

PAGE = 4


@st.composite
def tables_and_rows(draw: st.DrawFn) -> tuple[PageTables, AttentionRows]:
    """Entries that begin at any column of any row, and reach to any column behind it."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 11))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    first = random.integers(0, width, draw(st.integers(1, 6)))
    num_pages = random.integers(1, width - first + 1)
    rows = AttentionRows(
        table_row=random.integers(0, height, len(first)),
        first_page=first,
        num_rows=np.ones(len(first), dtype=np.int64),
        kv_len=num_pages * PAGE - random.integers(0, PAGE, len(first)),
        causal=np.ones(len(first), dtype=np.bool_),
    )
    host = random.integers(0, 1000, (height, width)).astype(np.int32)
    return PageTables.from_host(host, device=torch.device("cpu")), rows


@settings(max_examples=200, deadline=None)
@given(case=tables_and_rows())
def test_joined_tables_hold_each_entrys_pages_in_order_wherever_they_are_joined(
    case: tuple[PageTables, AttentionRows],
) -> None:
    tables, rows = case
    joined = join_tables(tables, rows, page_size=PAGE, buffer=IndexBuffer())
    num_pages = -(-rows.kv_len // PAGE)
    wanted = [
        page
        for row, first, count in zip(rows.table_row, rows.first_page, num_pages, strict=True)
        for page in tables.host[row, first : first + count].tolist()
    ]
    assert joined.indices.tolist() == wanted and joined.indptr.diff().tolist() == num_pages.tolist()
    assert joined.last_page_len.tolist() == [(length - 1) % PAGE + 1 for length in rows.kv_len.tolist()]
    out = np.empty(len(wanted), dtype=np.int32)
    on_host = join_on_host(tables, rows, num_pages=num_pages, out=out)
    on_device = join_on_device(tables, rows, num_pages=num_pages, total=len(wanted))
    assert on_device.dtype == torch.int32 and torch.equal(on_host, on_device)
