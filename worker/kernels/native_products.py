"""Products in C++ with a weight that is packed in panels of outputs. What a row gives depends on no other row."""

import math
from dataclasses import dataclass

import torch

from native.arena import Arena
from native.library import NativeLibrary
from parallel.models.gates import Activation


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight of `out` outputs (of pairs: units) over `size` inputs, and its bias; pointers live as long as it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    out: int
    size: int

    @property
    def pointers(self) -> tuple[int, int | None]:
        """Of the weight and of the bias."""
        return self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr()


class Packer:
    """Packs float32 weights into an arena."""

    def __init__(self, library: NativeLibrary, *, arena: Arena) -> None:
        self.library = library
        self._arena = arena

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """weight [out, in], bias [out]."""
        out, size = weight.shape
        packed, rows = self._take(self.library.packed_floats(out, size)), _rows(weight)
        self.library.pack(rows.data_ptr(), rows.stride(0), out, size, packed.data_ptr(), self.library.num_threads)
        return Packed(weight=packed, bias=None if bias is None else bias.contiguous(), out=out, size=size)

    def pack_pairs(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Packed:
        """gate and up [I, in], biases [I] each."""
        units, size = gate.shape
        packed = self._take(self.library.packed_pair_floats(units, size))
        gates, ups = gate.contiguous(), up.contiguous()
        self.library.pack_pairs(
            gates.data_ptr(), ups.data_ptr(), size, units, size, packed.data_ptr(), self.library.num_threads
        )
        return Packed(weight=packed, bias=None if biases is None else torch.cat(biases), out=units, size=size)

    def _take(self, num_floats: int) -> torch.Tensor:
        return torch.frombuffer(self._arena.take(4 * num_floats), dtype=torch.float32)


class NativeLinear:
    """x [T, in] -> [T, out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, packer: Packer) -> None:
        self._packed = packer.pack(weight, bias)
        self._product = packer.library.product
        self._num_threads = packer.library.num_threads

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        packed = self._packed
        x = checked_rows(x, packed.size)
        out = x.new_empty((x.shape[0], packed.out))
        self._product(
            *(x.data_ptr(), x.stride(0), x.shape[0]),
            *(*packed.pointers, packed.out, packed.size),
            *(out.data_ptr(), packed.out, self._num_threads),
        )
        return out


class NativeGated:
    """x [T, in] -> activation of its products with gate and up: [T, I]."""

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        activation: Activation,
        packer: Packer,
    ) -> None:
        self._packed = packer.pack_pairs(gate, up, biases)
        self._activation = activation_floats(activation)
        self._product = packer.library.gated_product
        self._num_threads = packer.library.num_threads

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, I]."""
        packed = self._packed
        x = checked_rows(x, packed.size)
        out = x.new_empty((x.shape[0], packed.out))
        self._product(
            *(x.data_ptr(), x.stride(0), x.shape[0]),
            *(*packed.pointers, packed.out, packed.size),
            *self._activation,
            *(out.data_ptr(), packed.out, self._num_threads),
        )
        return out


def activation_floats(activation: Activation) -> tuple[float, float, float]:
    """alpha, up_offset and limit as the library takes them."""
    return activation.alpha, activation.up_offset, math.inf if activation.limit is None else activation.limit


def checked_rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [T, size] in float32, each row's elements side by side; nothing behind this looks again."""
    assert x.dim() == 2 and x.shape[1] == size and x.dtype == torch.float32, (x.shape, x.dtype, size)
    return _rows(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
