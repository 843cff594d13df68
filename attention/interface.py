"""The contract of an attention kernel: `plan` once a step on the host, `run` and `write` once a layer on the device.

Shapes: E entries, T query rows, Hq query heads, Hkv KV heads, Dk and Dv widths of a key and of a value, P page size,
N pages of memory. Nothing is known by convention: where a key or a value lies is in the strides of `LayerMemory`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from attention.dtypes import TORCH_DTYPES
from attention.layer_memory import LayerMemory
from parallel.arrays import Bools, Ints
from parallel.storage import PageLayout, PlaneView


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What all layers of one cache group share on one rank: its own heads, not the model's.

    With a `window` a query sees the last `window` keys up to its own; with `listed`, as many positions as that at most,
    by a list of its own that `run` is given.
    """

    num_heads: int
    page: PageLayout
    key: PlaneView
    value: PlaneView
    device: torch.device
    window: int = 0
    listed: int = 0

    @property
    def page_size(self) -> int:
        """P."""
        return self.page.page_size

    @property
    def num_kv_heads(self) -> int:
        """Hkv: 1 where the key is shared over heads."""
        return self.page.plane(self.key.plane).num_heads

    @property
    def dtype(self) -> torch.dtype:
        """That of the stored keys."""
        return TORCH_DTYPES[self.page.plane(self.key.plane).dtype]


@dataclass(frozen=True, kw_only=True)
class PageTables:
    """Page numbers by row, int32 [R, W]: on the device for kernels, and the same on the host. Rows may be longer than
    what they hold: entries say how far they are read.
    """

    host: npt.NDArray[np.int32]
    device: torch.Tensor

    @classmethod
    def from_host(cls, host: npt.NDArray[np.int32], *, device: torch.device) -> "PageTables":
        """Tables made on the host; on a CPU both are one memory."""
        return cls(host=host, device=torch.from_numpy(host).to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """E entries, each of consecutive query rows of one sequence and the keys that they see; all [E].

    An entry's keys lie in the pages of `table_row`, from the column `first_page` on, in order of position; `kv_len`
    counts them from that page's first. Where `causal` its rows stand at the keys [kv_len - num_rows, kv_len), so row i
    sees the first kv_len - num_rows + i + 1 of them (a bottom-right mask), or of these the last `window`; where not,
    each row sees all kv_len.
    """

    table_row: Ints
    first_page: Ints
    num_rows: Ints
    kv_len: Ints
    causal: Bools

    def __len__(self) -> int:
        return len(self.num_rows)

    @property
    def total_rows(self) -> int:
        """T."""
        return int(self.num_rows.sum())

    @property
    def starts(self) -> Ints:
        """The first row in q of each entry."""
        return np.cumsum(self.num_rows) - self.num_rows

    def take(self, index: Ints | Bools) -> "AttentionRows":
        """The entries at `index`."""
        return AttentionRows(
            table_row=self.table_row[index],
            first_page=self.first_page[index],
            num_rows=self.num_rows[index],
            kv_len=self.kv_len[index],
            causal=self.causal[index],
        )


@dataclass(frozen=True, kw_only=True)
class KvWrite:
    """Where new rows go: row i to page `pages[i]`, position `offsets[i]` inside it; int32 [T] on the device, so that a
    kernel that computes the rows may write them itself.
    """

    pages: torch.Tensor
    offsets: torch.Tensor

    @cached_property
    def as_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in int64, as torch indexes with; made once for all layers."""
        return self.pages.long(), self.offsets.long()


class AttentionPlan(Protocol):
    """One step's attention, the same for every layer of a cache group."""

    def run(self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of q [T, Hq, Dk] over a layer's memory; returns [T, Hq, Dv]. Scales by the layer's scale.

        The value in it is finite everywhere, also where nothing was written yet: memory starts as zeros, because the
        values that a row does not see are multiplied too, by zero. A key may be NaN: scores are selected, never added
        to. A row that sees nothing gives zeros, one that sees a NaN key gives NaN.

        `lists` int32 [T, listed], on the device: the keys of its entry that each row sees, -1 for none.
        """
        ...

    def run_with_lse(
        self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, and the natural log-sum-exp of the scaled scores, float32 [T, Hq].

        A row that sees nothing gives zeros and -inf.
        """
        ...


class AttentionBackend(Protocol):
    """One kind of kernel on one device, for one cache group."""

    @property
    def spec(self) -> AttentionSpec:
        """What it was made for."""
        ...

    def plan(self, tables: PageTables, rows: AttentionRows) -> AttentionPlan:
        """Plans attention for rows that follow each other in q in the order of their entries; they may be none.

        The plan reads the tables as they are now. ValueError where an entry contradicts itself.
        """
        ...

    def write(self, layer: LayerMemory, planes: Sequence[torch.Tensor], where: KvWrite) -> None:
        """Writes new rows, for each plane of the group [T, heads, elements] in their order; T may be 0.

        What holds no numbers is stored as `broken_rows` says, so that values stay finite.
        """
        ...

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merges S partial results over disjoint KV: outputs [S, T, Hq, D], natural lses [S, T, Hq].

        Returns [T, Hq, D] and the merged natural log-sum-exp [T, Hq]. Parts that saw nothing have -inf and count
        nothing; where all parts saw nothing the result is zeros and -inf.
        """
        ...
