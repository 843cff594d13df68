"""Attention over paged KV in FlashInfer: the backend for ranks on an NVIDIA GPU.

Rows are parted into at most three passes over the same memory, each its own kernel: single rows go to the decode
kernel, which reads every page once and is bound by memory alone; the others to the prefill kernel, once with causal
masks and once without, which is a property of a whole plan. Single rows are kept out of prefill because its query tile
is chosen for the mean of its rows: beside a long chunk each would occupy a tile of 64 or 128 rows.
Base-2 log-sum-exps are converted to natural ones here and nowhere else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from attention.broken_rows import mark_broken
from attention.flashinfer_kernel.library import FlashInferLibrary, PagedDecode, PagedPrefill, PagedRun, load_flashinfer
from attention.flashinfer_kernel.page_tables import IndexBuffer, join_tables
from attention.flashinfer_kernel.wrapper_pool import Loan, WrapperPool
from attention.interface import AttentionRows, AttentionSpec, KvWrite, PageTables
from attention.layer_memory import LayerMemory
from attention.rows import check_rows
from parallel.arrays import Bools

RunT = TypeVar("RunT", bound=PagedRun)

KV_LAYOUT = "HND"
"""The order of the dimensions [N, heads, P, elements]; strides say where they lie."""
WORKSPACE_BYTES = 384 << 20
"""Partial results of sequences that are split over blocks of the GPU. 128 MiB are the library's advice, and are short
for long prompts of many heads, where a plan fails."""
TENSOR_CORE_GROUP = 4
"""Query heads of a KV head from which the decode kernel is faster with tensor cores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FlashInferPass:
    """The rows of a plan that one kernel takes."""

    wrapper: PagedRun
    order: torch.Tensor | None
    """int64 on the device: its rows in q; none where that is all of q as it stands."""

    def run(self, q: torch.Tensor, layer: LayerMemory) -> tuple[torch.Tensor, torch.Tensor]:
        """Its rows' output and base-2 log-sum-exp."""
        rows = q if self.order is None else q.index_select(0, self.order)
        # Planned with a scale of 1: the scale is the layer's.
        return self.wrapper.run(rows, (layer.key, layer.value), q_scale=layer.scale, return_lse=True)


@dataclass(frozen=True, kw_only=True)
class FlashInferPlan:
    """One step's attention. Its wrappers go back to the backend when it is garbage."""

    num_rows: int
    every_row_sees: bool
    passes: Sequence[FlashInferPass]

    def run(self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None) -> torch.Tensor:
        """See `AttentionPlan.run`."""
        assert lists is None
        return self._run(q, layer)[0]

    def run_with_lse(
        self, q: torch.Tensor, layer: LayerMemory, *, lists: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionPlan.run_with_lse`."""
        assert lists is None
        output, lse = self._run(q, layer)
        return output, lse * math.log(2)

    def _run(self, q: torch.Tensor, layer: LayerMemory) -> tuple[torch.Tensor, torch.Tensor]:
        assert q.shape[0] == self.num_rows, f"planned for {self.num_rows} query rows, given {q.shape[0]}"
        if len(self.passes) == 1 and self.passes[0].order is None:
            return self.passes[0].run(q, layer)
        output = q.new_empty(q.shape) if self.every_row_sees else q.new_zeros(q.shape)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for part in self.passes:
            assert part.order is not None
            part_output, part_lse = part.run(q, layer)
            output.index_copy_(0, part.order, part_output)
            lse.index_copy_(0, part.order, part_lse)
        return output, lse


class FlashInferAttentionBackend:
    """See `AttentionBackend`. All calls are on one stream; `plan` copies to the device and must not be captured."""

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        library: FlashInferLibrary | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        """Imports FlashInfer unless given a `library`, and allocates `workspace_bytes` on the device, once.

        Raises ImportError or ValueError where FlashInfer is missing or does not take the spec.
        """
        self._spec = spec
        self._library = load_flashinfer(spec) if library is None else library
        # Zeros: its split reduction counts arrivals in it and leaves the counters as it found them.
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=spec.device)
        self._decode = WrapperPool(self._new_decode)
        self._prefill = WrapperPool(self._new_prefill)
        self._indices = IndexBuffer()
        self._numbers = self._full_pages = torch.empty(0, dtype=torch.int32, device=spec.device)

    @property
    def spec(self) -> AttentionSpec:
        """See `AttentionBackend.spec`."""
        return self._spec

    def plan(self, tables: PageTables, rows: AttentionRows) -> FlashInferPlan:
        """See `AttentionBackend.plan`. Raises ValueError where an entry contradicts itself."""
        check_rows(rows, tables=tables, page_size=self._spec.page_size)
        # An entry without keys reaches no kernel: the library's page tables cannot say an empty last page.
        sees, is_single = (rows.num_rows > 0) & (rows.kv_len > 0), rows.num_rows == 1
        passes = [
            *(self._plan_decode(tables, rows, chosen, window=window) for chosen, window in self._single(rows, sees)),
            self._plan_prefill(tables, rows, sees & ~is_single & rows.causal, causal=True),
            self._plan_prefill(tables, rows, sees & ~is_single & ~rows.causal, causal=False),
        ]
        return FlashInferPlan(
            num_rows=rows.total_rows,
            every_row_sees=bool(np.all(sees | (rows.num_rows == 0))),
            passes=[part for part in passes if part is not None],
        )

    def _single(self, rows: AttentionRows, sees: Bools) -> list[tuple[Bools, int]]:
        """Single rows with their window, which is a property of a whole plan: none hides anything of one not causal."""
        single = sees & (rows.num_rows == 1)
        if not self._spec.window:
            return [(single, 0)]
        return [(single & rows.causal, self._spec.window), (single & ~rows.causal, 0)]

    def _plan_decode(
        self, tables: PageTables, rows: AttentionRows, chosen: Bools, *, window: int
    ) -> FlashInferPass | None:
        if not chosen.any():
            return None
        joined = join_tables(tables, rows.take(chosen), page_size=self._spec.page_size, buffer=self._indices)
        loan = self._decode.lend()
        loan.wrapper.plan(
            joined.indptr,
            joined.indices,
            joined.last_page_len,
            self._spec.num_heads,
            self._spec.num_kv_heads,
            self._spec.key.width,
            self._spec.page_size,
            window_left=window - 1,
            q_data_type=self._spec.dtype,
            kv_data_type=self._spec.dtype,
            sm_scale=1.0,
        )
        return self._pass(self._decode, loan, order=self._order(rows, chosen))

    def _plan_prefill(
        self, tables: PageTables, rows: AttentionRows, chosen: Bools, *, causal: bool
    ) -> FlashInferPass | None:
        if not chosen.any():
            return None
        joined = join_tables(tables, rows.take(chosen), page_size=self._spec.page_size, buffer=self._indices)
        loan = self._prefill.lend()
        loan.wrapper.plan(
            joined.qo_indptr,
            joined.indptr,
            joined.indices,
            joined.last_page_len,
            self._spec.num_heads,
            self._spec.num_kv_heads,
            self._spec.key.width,
            self._spec.page_size,
            causal=causal,
            window_left=self._spec.window - 1 if causal else -1,
            sm_scale=1.0,
            q_data_type=self._spec.dtype,
            kv_data_type=self._spec.dtype,
        )
        return self._pass(self._prefill, loan, order=self._order(rows, chosen))

    def _pass(self, pool: WrapperPool[RunT], loan: Loan[RunT], *, order: torch.Tensor | None) -> FlashInferPass:
        loan.mark_planned(self._spec.device)
        planned = FlashInferPass(wrapper=loan.wrapper, order=order)
        pool.take_back(loan, after=planned)
        return planned

    def _order(self, rows: AttentionRows, chosen: Bools) -> torch.Tensor | None:
        is_in = np.repeat(chosen, rows.num_rows)
        return None if is_in.all() else torch.from_numpy(np.flatnonzero(is_in)).to(self._spec.device, non_blocking=True)

    def write(self, layer: LayerMemory, planes: Sequence[torch.Tensor], where: KvWrite) -> None:
        """See `AttentionBackend.write`."""
        num_rows = len(planes[0])
        if num_rows == 0:
            return
        k, v = mark_broken(planes, self._spec)
        # Each row is a sequence of one full page of its own: only that page and the offset in it depend on data.
        numbers, full_pages = self._one_page_tables(num_rows)
        self._library.append_paged_kv_cache(
            k,
            v,
            batch_indices=numbers[:-1],
            positions=where.offsets,
            paged_kv_cache=(layer.key, layer.value),
            kv_indices=where.pages,
            kv_indptr=numbers,
            kv_last_page_len=full_pages,
            kv_layout=KV_LAYOUT,
        )

    def _one_page_tables(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counting numbers [num_rows + 1] and full last pages [num_rows], kept because every layer writes."""
        if len(self._full_pages) < num_rows:
            self._numbers = torch.arange(num_rows + 1, dtype=torch.int32, device=self._spec.device)
            self._full_pages = torch.full_like(self._numbers[:-1], self._spec.page_size)
        return self._numbers[: num_rows + 1], self._full_pages[:num_rows]

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.merge`."""
        if outputs.shape[1] == 0:
            return outputs[0], lses[0]
        merged, lse = self._library.merge_states(
            outputs.transpose(0, 1).contiguous(), (lses * math.log2(math.e)).transpose(0, 1).contiguous()
        )
        return merged, lse * math.log(2)

    def _new_decode(self) -> PagedDecode:
        group = self._spec.num_heads // self._spec.num_kv_heads
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, KV_LAYOUT, use_tensor_cores=group >= TENSOR_CORE_GROUP
        )

    def _new_prefill(self) -> PagedPrefill:
        return self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, KV_LAYOUT)
