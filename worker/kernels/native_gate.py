"""The gate of a layer in one call in C++."""

import ctypes

import torch

from moe.routed_rows import RoutedRows, RowFormat
from moe.slots import SlotMap
from native.library import Gate, NativeLibrary
from parallel.models.gates import GateSpec, GroupScore, Scoring
from worker.kernels.native_products import Packed, address, as_vector, checked_rows


class NativeGate:
    """See Gate. Of experts with equal scores the first is chosen."""

    def __init__(
        self,
        spec: GateSpec,
        *,
        logits: Packed,
        correction: torch.Tensor | None,
        slots: SlotMap,
        library: NativeLibrary,
    ) -> None:
        """`logits` is the product, with the norm before it."""
        assert logits.norm is not None and logits.out == spec.num_experts == slots.slots.shape[0]
        assert (correction is not None) == spec.has_correction
        self._logits, self._correction = logits, as_vector(correction)
        self._slots, self._copies = slots.slots.contiguous(), slots.copies.contiguous()
        self._form = RowFormat(hidden_size=logits.size, dtype=torch.float32, top_k=spec.top_k)
        self._gate = Gate(
            logits.product,
            address(self._correction),
            self._slots.data_ptr(),
            self._copies.data_ptr(),
            self._slots.shape[1],
            spec.top_k,
            spec.num_groups,
            spec.kept_groups,
            1 if spec.group_score is GroupScore.BEST else 2,
            spec.scoring is Scoring.SIGMOID,
            spec.renormalise,
            spec.scale,
        )
        self._address = ctypes.addressof(self._gate)
        self._run = library.gate
        self._num_threads = library.num_threads

    def __call__(self, x_TH: torch.Tensor, *, first_row: int, padded_rows: int) -> RoutedRows:
        """See Gate."""
        x = checked_rows(x_TH, self._logits.size)
        num_rows = x.shape[0]
        assert padded_rows >= num_rows, (padded_rows, num_rows)
        rows = self._form.empty(padded_rows, device=x.device)
        self._run(
            *(self._address, x.data_ptr(), x.stride(0), num_rows),
            *(first_row, padded_rows, rows.packed.data_ptr(), self._num_threads),
        )
        return rows
