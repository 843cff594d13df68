"""Rows of several planes go into a message and come out of it, whatever their sizes and dtypes are."""

import itertools

import pytest
import torch

from attention.dtypes import TORCH_DTYPES
from attention.exchange.row_packing import RowPacking
from parallel.storage import Plane, lay_out_page

PLANES = [(3, "bfloat16"), (4, "float16"), (5, "float32"), (1, "bfloat16")]


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PLANES, PLANES)))
def test_packed_rows_come_out_as_they_went_in(first: tuple[int, str], second: tuple[int, str], num_rows: int) -> None:
    planes = [
        Plane(name=name, elements=elements, per_head=per_head, dtype=dtype)
        for name, per_head, (elements, dtype) in (("a", True, first), ("b", False, second))
    ]
    packing = RowPacking(lay_out_page(planes, page_size=4, num_heads=2, dtype="float32"))
    rows = [
        torch.randn(6, heads, elements).to(TORCH_DTYPES[dtype])
        for heads, (elements, dtype) in ((2, first), (1, second))
    ]
    index = torch.arange(num_rows).flip(0)
    packed = packing.pack(rows, index, rows=num_rows + 1)
    assert packed.shape == (num_rows + 1, packing.row_bytes) and not packed[num_rows].any()
    for found, plane in zip(packing.unpack(packed[:num_rows]), rows, strict=True):
        assert torch.equal(found, plane[index])
