"""Query rows that see a list of positions each, in torch. The lists are made on the device and stay there."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from attention.interface import AttentionRows, AttentionSpec, PageTables
from attention.layer_memory import LayerMemory


@dataclass(frozen=True, kw_only=True)
class ListedRows:
    """The rows of a plan: of each its table row and first column (int64 [T], on the device)."""

    spec: AttentionSpec
    tables: torch.Tensor
    table_row: torch.Tensor
    first_page: torch.Tensor

    def run(self, q: torch.Tensor, layer: LayerMemory, lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, Hq, Dk] over the keys `lists` int32 [T, listed] of each row's entry, -1 for none; [T, Hq, Dv] and the
        log-sum-exp [T, Hq].
        """
        assert lists.shape == (q.shape[0], self.spec.listed), f"planned for lists of {self.spec.listed} a row"
        is_none = lists < 0
        positions = lists.long().clamp_min(0)
        columns = self.first_page.unsqueeze(1) + positions // self.spec.page_size
        pages = self.tables[self.table_row.unsqueeze(1), columns].long()
        offsets = positions % self.spec.page_size
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (view[pages, :, offsets].to(wide) for view in (layer.key, layer.value))
        queries = q.unflatten(1, (self.spec.num_kv_heads, -1)).to(wide)
        scores = torch.einsum("thgd,tkhd->thgk", queries, k) * layer.scale
        scores.masked_fill_(is_none[:, None, None], -math.inf)
        lse = scores.logsumexp(dim=-1)
        weights = (scores - torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)).exp()
        output = torch.einsum("thgk,tkhd->thgd", weights, v).flatten(1, 2)
        return output.to(q.dtype), lse.flatten(1).float()


def plan_listed_rows(tables: PageTables, rows: AttentionRows, *, spec: AttentionSpec) -> ListedRows:
    """Plans all rows of a step; what each sees is known only when it runs."""

    def by_row(values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(values, rows.num_rows)).to(spec.device, non_blocking=True)

    return ListedRows(
        spec=spec, tables=tables.device, table_row=by_row(rows.table_row), first_page=by_row(rows.first_page)
    )
