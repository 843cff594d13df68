"""All experts of a layer in one call."""

from collections.abc import Sequence

import torch

from moe.experts import ExpertWeights
from native.library import Expert
from parallel.models.gates import Activation
from worker.kernels.native_products import Packed, Packer, activation_floats, checked_rows


class NativeExperts:
    """See Experts. A row's sum is made in order of slots, whatever rows are beside it."""

    def __init__(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation, packer: Packer) -> None:
        """Packs each of `weights`, one for each slot from `first` on; one that has two slots once."""
        held = {id(each): _pack(each, packer) for each in weights}
        self._held = [held[id(each)] for each in weights]
        self._experts = (Expert * len(weights))(
            *(Expert(*gated.pointers, *down.pointers) for gated, down in self._held)
        )
        self._first = first
        self._activation = activation_floats(activation)
        self._run = packer.library.experts
        self._num_threads = packer.library.num_threads

    def run(self, x_NH: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """See Experts."""
        gated, _ = self._held[0]
        x = checked_rows(x_NH, gated.size).contiguous()
        slots, weights = slots_NK.contiguous(), weights_NK.to(torch.float32).contiguous()
        assert slots.shape == weights.shape and slots.dtype == torch.int64, (slots.shape, slots.dtype, weights.shape)
        # As if each row chose all of its experts here: what is not written to costs nothing.
        hidden, out = x.new_empty((slots.numel(), gated.out)), torch.empty_like(x)
        self._run(
            *(self._experts, self._first, len(self._experts), gated.stored),
            *(x.data_ptr(), *x.shape),
            *(slots.data_ptr(), weights.data_ptr(), slots.shape[1], gated.out),
            *self._activation,
            *(hidden.data_ptr(), out.data_ptr(), self._num_threads),
        )
        return out


def _pack(weights: ExpertWeights, packer: Packer) -> tuple[Packed, Packed]:
    gated = packer.pack_pairs(weights.gate, weights.up, weights.gate_up_biases)
    return gated, packer.pack(weights.down, weights.down_bias)
