"""Attention over paged KV in C++: the backend for ranks on a CPU that hold float32.

Entries of a few rows go through `page_rows`, longer ones through the blocks of torch's kernel, whose products are as
fast: a prompt's chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.broken_rows import mark_broken
from attention.interface import AttentionRows, AttentionSpec, KvWrite, PageTables
from attention.layer_memory import LayerMemory, Place
from attention.native_kernel.page_rows import PageRows, plan_page_rows
from attention.rows import check_rows
from attention.torch_kernel.backend import TorchAttentionBackend
from attention.torch_kernel.block_rows import BlockRows, plan_block_rows
from attention.torch_kernel.row_parts import part_rows
from attention.torch_kernel.scratch import Scratch
from native.library import NativeLibrary


@dataclass(frozen=True, kw_only=True)
class NativeAttentionPlan:
    """One step's attention. Plans of one backend share its scratch, so they run one at a time, on one thread."""

    num_rows: int
    value_width: int
    every_row_sees: bool
    short_rows: PageRows | None
    blocks: Sequence[BlockRows]
    scratch: Scratch

    def run(self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None) -> torch.Tensor:
        """See `AttentionPlan.run`."""
        return self._run(q, layer, lists=lists, lse=None)

    def run_with_lse(
        self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionPlan.run_with_lse`."""
        lse = q.new_full(q.shape[:2], -torch.inf)
        return self._run(q, layer, lists=lists, lse=lse), lse

    def _run(
        self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None, lse: torch.Tensor | None
    ) -> torch.Tensor:
        assert lists is None, "planned without lists of positions, given some"
        assert q.shape[0] == self.num_rows, f"planned for {self.num_rows} query rows, given {q.shape[0]}"
        shape = (*q.shape[:2], self.value_width)
        output = q.new_empty(shape) if self.every_row_sees else q.new_zeros(shape)
        if self.short_rows is not None:
            self.short_rows.run_into(q, layer, output=output, lse=lse)
        for block in self.blocks:
            block.run_into(q, layer, output=output, lse=lse, scratch=self.scratch)
        return output


class NativeAttentionBackend:
    """See `AttentionBackend`. What a row of a short entry gives depends on no other row."""

    def __init__(self, spec: AttentionSpec, *, library: NativeLibrary) -> None:
        """ValueError where the spec is not of float32 on a CPU, or of lists."""
        if not covers(spec):
            raise ValueError(f"the native attention kernel takes float32 on cpu, no lists of positions: {spec}")
        self._torch = TorchAttentionBackend(spec)
        self._library = library
        self._scratch = Scratch(dtype=spec.dtype, device=spec.device)

    @property
    def spec(self) -> AttentionSpec:
        """See `AttentionBackend.spec`."""
        return self._torch.spec

    def plan(self, tables: PageTables, rows: AttentionRows) -> NativeAttentionPlan:
        """See `AttentionBackend.plan`. Raises ValueError where an entry contradicts itself."""
        check_rows(rows, tables=tables, page_size=self.spec.page_size)
        parts, short = part_rows(rows), None
        if len(parts.short):
            short = plan_page_rows(
                tables, parts.short, starts=parts.short_starts, spec=self.spec, library=self._library
            )
        return NativeAttentionPlan(
            num_rows=rows.total_rows,
            value_width=self.spec.value.width,
            every_row_sees=parts.every_row_sees,
            short_rows=short,
            blocks=plan_block_rows(tables, parts.long, starts=parts.long_starts.tolist(), spec=self.spec),
            scratch=self._scratch,
        )

    def write(self, layer: LayerMemory, planes: Sequence[torch.Tensor], where: KvWrite) -> None:
        """See `AttentionBackend.write`."""
        if any(plane.dtype != torch.float32 for plane in layer.planes):
            self._torch.write(layer, planes, where)
            return
        are_numbers = [
            self._write_rows(rows, place, where) for rows, place in zip(planes, layer.plane_places, strict=True)
        ]
        if not all(are_numbers):
            self._torch.write(layer, mark_broken(planes, self.spec), where)

    def _write_rows(self, rows: torch.Tensor, place: Place, where: KvWrite) -> int:
        """Writes rows [T, heads, elements] into the plane at `place`; 0 where one was no number."""
        num_rows, heads, width = rows.shape
        row_stride, head_stride, element_stride = rows.stride()
        if (head_stride, element_stride) != (width, 1):
            rows, row_stride = rows.contiguous(), heads * width
        pages, offsets = where.pages, where.offsets
        assert rows.dtype == torch.float32 and num_rows == pages.shape[0], (rows.dtype, rows.shape, pages.shape)
        written: int = self._library.write_rows(
            *(rows.data_ptr(), row_stride, num_rows, heads, width),
            *(*place, pages.data_ptr(), offsets.data_ptr()),
        )
        return written

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.merge`."""
        return self._torch.merge(outputs, lses)


def covers(spec: AttentionSpec) -> bool:
    """Whether the kernel computes what `spec` describes."""
    return spec.device.type == "cpu" and spec.dtype == torch.float32 and not spec.listed
