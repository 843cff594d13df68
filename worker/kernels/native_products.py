"""Products in C++ with a weight that is packed in panels of outputs. What a row gives depends on no other row."""

import ctypes
import math
from dataclasses import dataclass

import torch

from native.arena import Arena
from native.library import Activation as NativeActivation
from native.library import NativeLibrary, Product, Stored
from parallel.models.gates import Activation
from worker.kernels.interface import Norm

#: The dtypes that a weight may have: all arithmetic is float32.
STORED = {torch.float32: Stored.FLOAT32, torch.bfloat16: Stored.BFLOAT16, torch.float16: Stored.FLOAT16}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight of `out` outputs (of pairs: units) over `size` inputs, stored as it came, its bias in float32, and the
    norm of the rows before it. Pointers live as long as it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: Norm | None
    out: int
    size: int

    @property
    def stored(self) -> Stored:
        """How the weight is held."""
        return STORED[self.weight.dtype]

    @property
    def pointers(self) -> tuple[int, int | None]:
        """Of the weight and of the bias."""
        return self.weight.data_ptr(), address(self.bias)

    @property
    def product(self) -> Product:
        """As the library reads it."""
        norm, eps = (None, 0.0) if self.norm is None else (self.norm.weight.data_ptr(), self.norm.eps)
        return Product(*self.pointers, norm, self.out, self.size, eps, self.stored)


class Packer:
    """Packs weights into an arena, in the dtype that they have."""

    def __init__(self, library: NativeLibrary, *, arena: Arena) -> None:
        self.library = library
        self._arena = arena

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, *, norm: Norm | None = None) -> Packed:
        """weight [out, in], bias [out]."""
        out, size = weight.shape
        packed, rows = self._take(self.library.packed_size(out, size), weight.dtype), side_by_side(weight)
        self.library.pack(
            STORED[weight.dtype],
            *(rows.data_ptr(), rows.stride(0), out, size),
            *(packed.data_ptr(), self.library.num_threads),
        )
        return Packed(weight=packed, bias=as_vector(bias), norm=as_norm(norm), out=out, size=size)

    def pack_pairs(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        *,
        norm: Norm | None = None,
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
        bias = None if biases is None else torch.cat(biases)
        return Packed(weight=packed, bias=as_vector(bias), norm=as_norm(norm), out=units, size=size)

    def _take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self._arena.take(size * dtype.itemsize), dtype=dtype)


class NativeLinear:
    """See Linear."""

    def __init__(self, packed: Packed, *, library: NativeLibrary) -> None:
        self.packed = packed
        self._product = packed.product
        self._address = ctypes.addressof(self._product)
        self._run = library.product
        self._num_threads = library.num_threads

    def __call__(self, x: torch.Tensor, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """See Linear."""
        packed = self.packed
        x = checked_rows(x, packed.size)
        out, normed = x.new_empty((x.shape[0], packed.out)), scratch(x, packed)
        self._run(
            *(self._address, x.data_ptr(), x.stride(0), x.shape[0]),
            checked_sum(plus, out),
            *(address(normed), out.data_ptr(), self._num_threads),
        )
        return out


class NativeGated:
    """x [T, in] -> activation of its products with gate and up: [T, I]."""

    def __init__(self, packed: Packed, *, activation: Activation, library: NativeLibrary) -> None:
        self.packed = packed
        self._product, self._activation = packed.product, as_activation(activation)
        self._addresses = ctypes.addressof(self._product), ctypes.addressof(self._activation)
        self._run = library.gated_product
        self._num_threads = library.num_threads

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, I]."""
        packed = self.packed
        x = checked_rows(x, packed.size)
        out, normed = x.new_empty((x.shape[0], packed.out)), scratch(x, packed)
        self._run(
            *(*self._addresses, x.data_ptr(), x.stride(0), x.shape[0]),
            *(address(normed), out.data_ptr(), self._num_threads),
        )
        return out


def as_activation(activation: Activation) -> NativeActivation:
    """As the library reads it."""
    limit = math.inf if activation.limit is None else activation.limit
    return NativeActivation(activation.alpha, activation.up_offset, limit)


def checked_rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [T, size] in float32, each row's elements side by side; nothing behind this looks again."""
    assert x.dim() == 2 and x.shape[1] == size and x.dtype == torch.float32, (x.shape, x.dtype, size)
    return side_by_side(x)


def checked_sum(plus: torch.Tensor | None, out: torch.Tensor) -> int | None:
    """The address of `plus`, where given: of the shape of `out`, and contiguous as that is."""
    if plus is None:
        return None
    assert plus.shape == out.shape and plus.dtype == torch.float32 and plus.is_contiguous(), (plus.shape, out.shape)
    return plus.data_ptr()


def address(tensor: torch.Tensor | None) -> int | None:
    """Where it lies, if it does."""
    return None if tensor is None else tensor.data_ptr()


def scratch(x: torch.Tensor, packed: Packed) -> torch.Tensor | None:
    """Where rows x [T, in] are normed, if they are."""
    return None if packed.norm is None else x.new_empty(x.shape)


def as_norm(norm: Norm | None) -> Norm | None:
    """With a weight as the library reads it."""
    if norm is None:
        return None
    assert norm.weight.dtype == torch.float32, norm.weight.dtype
    return Norm(weight=norm.weight.contiguous(), eps=norm.eps)


def as_vector(vector: torch.Tensor | None) -> torch.Tensor | None:
    """In float32, its elements side by side."""
    return None if vector is None else vector.float().contiguous()


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x [T, D], whose rows may lie apart, but not the elements of one."""
    return x if x.stride(1) == 1 else x.contiguous()
