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
from attention.flashinfer_library import FlashInferLibrary, PagedDecode, PagedPrefill, PagedRun, load_flashinfer
from attention.interface import AttentionRows, AttentionSpec, KvWrite
from attention.page_tables import join_tables
from attention.rows import check_rows, row_starts
from attention.wrapper_pool import Loan, WrapperPool

Entry = tuple[int, AttentionRows]
"""An entry of a plan and its first row in q."""
RunT = TypeVar("RunT", bound=PagedRun)

KV_LAYOUT = "HND"
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

    def run(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its rows' output and base-2 log-sum-exp."""
        rows = q if self.order is None else q.index_select(0, self.order)
        return self.wrapper.run(rows, kv, return_lse=True)


@dataclass(frozen=True, kw_only=True)
class FlashInferPlan:
    """One step's attention. Its wrappers go back to the backend when it is garbage."""

    num_rows: int
    every_row_sees: bool
    passes: Sequence[FlashInferPass]

    def run(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See `AttentionPlan.run`."""
        return self._run(q, kv)[0]

    def run_with_lse(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionPlan.run_with_lse`."""
        output, lse = self._run(q, kv)
        return output, lse * math.log(2)

    def _run(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert q.shape[0] == self.num_rows, f"planned for {self.num_rows} query rows, given {q.shape[0]}"
        if len(self.passes) == 1 and self.passes[0].order is None:
            return self.passes[0].run(q, kv)
        output = q.new_empty(q.shape) if self.every_row_sees else q.new_zeros(q.shape)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for part in self.passes:
            assert part.order is not None
            part_output, part_lse = part.run(q, kv)
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
        self._numbers = self._full_pages = torch.empty(0, dtype=torch.int32, device=spec.device)

    def plan(self, rows: Sequence[AttentionRows]) -> FlashInferPlan:
        """See `AttentionBackend.plan`. Raises ValueError where an entry contradicts itself."""
        check_rows(rows, page_size=self._spec.page_size)
        starts = row_starts(rows)
        # An entry without keys reaches no kernel: the library's page tables cannot say an empty last page.
        seeing = [(start, entry) for start, entry in zip(starts, rows, strict=False) if entry.num_rows and entry.kv_len]
        single = [(start, entry) for start, entry in seeing if entry.num_rows == 1]
        causal = [(start, entry) for start, entry in seeing if entry.num_rows > 1 and entry.causal]
        full = [(start, entry) for start, entry in seeing if entry.num_rows > 1 and not entry.causal]
        passes = [
            self._plan_decode(single, total_rows=starts[-1]),
            self._plan_prefill(causal, causal=True, total_rows=starts[-1]),
            self._plan_prefill(full, causal=False, total_rows=starts[-1]),
        ]
        return FlashInferPlan(
            num_rows=starts[-1],
            every_row_sees=sum(entry.num_rows for _, entry in seeing) == starts[-1],
            passes=[part for part in passes if part is not None],
        )

    def _plan_decode(self, entries: Sequence[Entry], *, total_rows: int) -> FlashInferPass | None:
        if not entries:
            return None
        tables = join_tables([entry for _, entry in entries], page_size=self._spec.page_size)
        loan = self._decode.lend()
        loan.wrapper.plan(
            tables.indptr,
            tables.indices,
            tables.last_page_len,
            self._spec.num_heads,
            self._spec.num_kv_heads,
            self._spec.head_dim,
            self._spec.page_size,
            q_data_type=self._spec.dtype,
            kv_data_type=self._spec.dtype,
            sm_scale=self._spec.scale,
        )
        return self._pass(self._decode, loan, order=self._order(entries, total_rows=total_rows))

    def _plan_prefill(self, entries: Sequence[Entry], *, causal: bool, total_rows: int) -> FlashInferPass | None:
        if not entries:
            return None
        tables = join_tables([entry for _, entry in entries], page_size=self._spec.page_size)
        loan = self._prefill.lend()
        loan.wrapper.plan(
            tables.qo_indptr,
            tables.indptr,
            tables.indices,
            tables.last_page_len,
            self._spec.num_heads,
            self._spec.num_kv_heads,
            self._spec.head_dim,
            self._spec.page_size,
            causal=causal,
            sm_scale=self._spec.scale,
            q_data_type=self._spec.dtype,
            kv_data_type=self._spec.dtype,
        )
        return self._pass(self._prefill, loan, order=self._order(entries, total_rows=total_rows))

    def _pass(self, pool: WrapperPool[RunT], loan: Loan[RunT], *, order: torch.Tensor | None) -> FlashInferPass:
        loan.mark_planned(self._spec.device)
        planned = FlashInferPass(wrapper=loan.wrapper, order=order)
        pool.take_back(loan, after=planned)
        return planned

    def _order(self, entries: Sequence[Entry], *, total_rows: int) -> torch.Tensor | None:
        rows = np.concatenate([np.arange(start, start + entry.num_rows) for start, entry in entries])
        return None if len(rows) == total_rows else torch.from_numpy(rows).to(self._spec.device)

    def write(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: KvWrite) -> None:
        """See `AttentionBackend.write`."""
        num_rows = k.shape[0]
        if num_rows == 0:
            return
        k, v = mark_broken(k, v)
        # Each row is a sequence of one full page of its own: only that page and the offset in it depend on data.
        numbers, full_pages = self._one_page_tables(num_rows)
        self._library.append_paged_kv_cache(
            k,
            v,
            batch_indices=numbers[:-1],
            positions=where.offsets.to(torch.int32),
            paged_kv_cache=kv,
            kv_indices=where.pages.to(torch.int32),
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
