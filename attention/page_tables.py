"""Page tables of many sequences as FlashInfer takes them: one list of pages, offsets into it, last pages' lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from attention.interface import AttentionRows


@dataclass(frozen=True, kw_only=True)
class PageTables:
    """B sequences, all int32 on the host: the library plans there and copies what its kernels need."""

    qo_indptr: torch.Tensor
    """[B + 1]: where each sequence's query rows start."""
    indptr: torch.Tensor
    """[B + 1]: where each sequence's pages start in `indices`."""
    indices: torch.Tensor
    last_page_len: torch.Tensor
    """[B]: positions in use of each last page, 1 to page_size."""


def join_tables(entries: Sequence[AttentionRows], *, page_size: int) -> PageTables:
    """Joins the tables of entries with at least one key each."""
    return PageTables(
        qo_indptr=_offsets([entry.num_rows for entry in entries]),
        indptr=_offsets([len(entry.page_table) for entry in entries]),
        indices=torch.from_numpy(np.concatenate([np.asarray(entry.page_table, dtype=np.int32) for entry in entries])),
        last_page_len=torch.tensor([(entry.kv_len - 1) % page_size + 1 for entry in entries], dtype=torch.int32),
    )


def _offsets(sizes: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32)
