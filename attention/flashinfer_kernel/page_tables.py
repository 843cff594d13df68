"""Page tables of many sequences as FlashInfer takes them: one list of pages, offsets into it, last pages' lengths."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from attention.interface import AttentionRows, PageTables
from parallel.arrays import Ints


@dataclass(frozen=True, kw_only=True)
class JoinedTables:
    """B sequences. Offsets and lengths are int32 on the host, where the library plans; pages lie where tables do."""

    qo_indptr: torch.Tensor
    """[B + 1]: where each sequence's query rows start."""
    indptr: torch.Tensor
    """[B + 1]: where each sequence's pages start in `indices`."""
    indices: torch.Tensor
    """On the device: kernels read them there."""
    last_page_len: torch.Tensor
    """[B]: positions in use of each last page, 1 to page_size."""


class IndexBuffer:
    """Host memory that pages are joined in, kept from step to step: fresh megabytes cost more than filling them. All
    that `take` returns is the same memory, which the library has copied when its plan returns.
    """

    def __init__(self) -> None:
        self._numbers = np.empty(0, dtype=np.int32)

    def take(self, size: int) -> npt.NDArray[np.int32]:
        """Uninitialised int32 [size]."""
        if len(self._numbers) < size:
            self._numbers = np.empty(2 * size, dtype=np.int32)
        return self._numbers[:size]


def join_tables(tables: PageTables, rows: AttentionRows, *, page_size: int, buffer: IndexBuffer) -> JoinedTables:
    """Joins the tables of entries with at least one key each."""
    num_pages = -(-rows.kv_len // page_size)
    indptr = _offsets(num_pages)
    return JoinedTables(
        qo_indptr=torch.from_numpy(_offsets(rows.num_rows)),
        indptr=torch.from_numpy(indptr),
        indices=_indices(tables, rows, num_pages=num_pages, total=int(indptr[-1]), buffer=buffer),
        last_page_len=torch.from_numpy(((rows.kv_len - 1) % page_size + 1).astype(np.int32)),
    )


def _indices(
    tables: PageTables, rows: AttentionRows, *, num_pages: Ints, total: int, buffer: IndexBuffer
) -> torch.Tensor:
    """The entries' pages one after the other, int32 [total]."""
    if tables.device.is_cpu:
        return join_on_host(tables, rows, num_pages=num_pages, out=buffer.take(total))
    return join_on_device(tables, rows, num_pages=num_pages, total=total)


def join_on_host(
    tables: PageTables, rows: AttentionRows, *, num_pages: Ints, out: npt.NDArray[np.int32]
) -> torch.Tensor:
    """Into `out` int32 [total]: a copy for each entry."""
    begin = 0
    places = zip(rows.table_row.tolist(), rows.first_page.tolist(), num_pages.tolist(), strict=True)
    for row, first, count in places:
        out[begin : begin + count] = tables.host[row, first : first + count]
        begin += count
    return torch.from_numpy(out)


def join_on_device(tables: PageTables, rows: AttentionRows, *, num_pages: Ints, total: int) -> torch.Tensor:
    """Where the tables are: what goes there is a number for each entry, however long it is. Does not synchronise."""
    device = tables.device.device
    starts = rows.table_row * tables.host.shape[1] + rows.first_page - (np.cumsum(num_pages) - num_pages)
    counts = torch.from_numpy(num_pages).to(device, non_blocking=True)
    shift = torch.from_numpy(starts).to(device, non_blocking=True)
    flat = torch.arange(total, device=device) + shift.repeat_interleave(counts, output_size=total)
    return tables.device.reshape(-1).index_select(0, flat)


def _offsets(sizes: Ints) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
