"""All experts of a layer in one call."""

import ctypes
from collections.abc import Sequence

import torch

from moe.experts import ExpertWeights
from moe.routed_rows import RoutedRows
from native.library import Expert, Experts
from parallel.models.gates import Activation
from worker.kernels.native_products import Packed, Packer, as_activation, checked_sum


class NativeExperts:
    """See Experts. A row's sum is made in order of slots, whatever rows are beside it."""

    def __init__(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation, packer: Packer) -> None:
        """Packs each of `weights`, one for each slot from `first` on; one that has two slots once."""
        held = {id(each): _pack(each, packer) for each in weights}
        self._held = [held[id(each)] for each in weights]
        self._gated = self._held[0][0]
        self._each = (Expert * len(weights))(*(Expert(*gated.pointers, *down.pointers) for gated, down in self._held))
        self._first = first
        self._by = as_activation(activation)
        self._layers: dict[int, Experts] = {}  # by the number of choices
        self._run = packer.library.experts
        self._num_threads = packer.library.num_threads

    def run(self, rows: RoutedRows, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Experts."""
        gated, form, packed = self._gated, rows.form, rows.packed
        assert form.hidden_size == gated.size and form.dtype == torch.float32 and packed.is_contiguous(), form
        num_rows = packed.shape[0]
        # As if each row chose all of its experts here: what is not written to costs nothing.
        hidden = torch.empty((num_rows * form.top_k, gated.out))
        out = torch.empty((num_rows, gated.size))
        self._run(
            *(self._layer(form.top_k), packed.data_ptr(), form.row_bytes // 4, num_rows),
            checked_sum(plus, out),
            *(hidden.data_ptr(), out.data_ptr(), self._num_threads),
        )
        return out

    def _layer(self, choices: int) -> int:
        """Its address, for rows of so many choices."""
        if choices not in self._layers:
            each, gated = ctypes.addressof(self._each), self._gated
            self._layers[choices] = Experts(
                each, self._first, len(self._each), gated.size, gated.out, choices, self._by, gated.stored
            )
        return ctypes.addressof(self._layers[choices])


def _pack(weights: ExpertWeights, packer: Packer) -> tuple[Packed, Packed]:
    gated = packer.pack_pairs(weights.gate, weights.up, weights.gate_up_biases)
    return gated, packer.pack(weights.down, weights.down_bias)
