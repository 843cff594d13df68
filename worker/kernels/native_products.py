"""Products in C++ with a weight that is packed in panels of outputs. What a row gives depends on no other row."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from native.arena import Arena
from native.library import NativeLibrary, Stored
from parallel.models.gates import Activation

#: The dtypes that a weight may have: all arithmetic is float32.
STORED = {torch.float32: Stored.FLOAT32, torch.bfloat16: Stored.BFLOAT16, torch.float16: Stored.FLOAT16}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight of `out` outputs (of pairs: units) over `size` inputs, stored as it came, and its bias in float32.

    Pointers live as long as it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    out: int
    size: int

    @property
    def stored(self) -> Stored:
        """How the weight is held."""
        return STORED[self.weight.dtype]

    @property
    def pointers(self) -> tuple[int, int | None]:
        """Of the weight and of the bias."""
        return self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr()


class Packer:
    """Packs weights into an arena, in the dtype that they have."""

    def __init__(self, library: NativeLibrary, *, arena: Arena) -> None:
        self.library = library
        self._arena = arena

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """weight [out, in], bias [out]."""
        out, size = weight.shape
        packed, rows = self._take(self.library.packed_size(out, size), weight.dtype), _rows(weight)
        self.library.pack(
            STORED[weight.dtype],
            *(rows.data_ptr(), rows.stride(0), out, size),
            *(packed.data_ptr(), self.library.num_threads),
        )
        return Packed(weight=packed, bias=_as_bias(bias), out=out, size=size)

    def pack_pairs(
        self, gate: torch.Tensor, up: torch.Tensor, biases: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Packed:
        """gate and up [I, in], biases [I] each."""
        units, size = gate.shape
        packed = self._take(self.library.packed_pair_size(units, size), gate.dtype)
        gates, ups = gate.contiguous(), up.contiguous()
        self.library.pack_pairs(
            STORED[gate.dtype],
            *(gates.data_ptr(), ups.data_ptr(), size, units, size),
            *(packed.data_ptr(), self.library.num_threads),
        )
        return Packed(weight=packed, bias=_as_bias(None if biases is None else torch.cat(biases)), out=units, size=size)

    def _take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self._arena.take(size * dtype.itemsize), dtype=dtype)


class NativeLinear:
    """x [T, in] -> [T, out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, packer: Packer) -> None:
        self.packed = packer.pack(weight, bias)
        self._library = packer.library

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return _multiply(self._library.product, x, self.packed, num_threads=self._library.num_threads)


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
        self.packed = packer.pack_pairs(gate, up, biases)
        self._activation = activation_floats(activation)
        self._library = packer.library

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, I]."""
        library = self._library
        return _multiply(
            library.gated_product, x, self.packed, activation=self._activation, num_threads=library.num_threads
        )


def _multiply(
    function: Callable[..., Any],
    x: torch.Tensor,
    packed: Packed,
    *,
    activation: tuple[float, ...] = (),
    num_threads: int,
) -> torch.Tensor:
    """What `function` of the library makes of x [T, in] and a weight: [T, out]."""
    x = checked_rows(x, packed.size)
    out = x.new_empty((x.shape[0], packed.out))
    function(
        *(x.data_ptr(), x.stride(0), x.shape[0]),
        *(packed.stored, *packed.pointers, packed.out, packed.size),
        *activation,
        *(out.data_ptr(), packed.out, num_threads),
    )
    return out


def activation_floats(activation: Activation) -> tuple[float, float, float]:
    """alpha, up_offset and limit as the library takes them."""
    return activation.alpha, activation.up_offset, math.inf if activation.limit is None else activation.limit


def checked_rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [T, size] in float32, each row's elements side by side; nothing behind this looks again."""
    assert x.dim() == 2 and x.shape[1] == size and x.dtype == torch.float32, (x.shape, x.dtype, size)
    return _rows(x)


def _as_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
