"""Products in C++ against numpy's, in each build that this processor can run."""

import ctypes
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from native.library import Activation, NativeLibrary, Product, Stored

Floats = npt.NDArray[np.float32]

EPS = 1e-3
#: (rows, out, in): empty, one, tails of a vector and of a panel, more rows than a block, one input.
SIZES = [
    (rows, out, size)
    for rows in (0, 1, 2, 5, 6, 7, 12, 13, 49, 97, 200)
    for out, size in ((1, 1), (3, 7), (16, 5), (17, 64), (33, 40), (64, 3), (95, 130))
]


#: How each kind of weight looks to numpy: of bfloat16, which it does not know, the bits.
DTYPES = {Stored.FLOAT32: np.float32, Stored.BFLOAT16: np.uint16, Stored.FLOAT16: np.float16}


def as_stored(weight: Floats, stored: Stored) -> npt.NDArray[Any]:
    """The weight as it is stored, cut where it has more bits."""
    if stored is Stored.BFLOAT16:
        return np.ascontiguousarray((weight.view(np.uint32) >> 16).astype(np.uint16))
    return weight.astype(DTYPES[stored])


def as_read(weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """What a stored weight means."""
    if weight.dtype == np.uint16:
        weight = (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float64)


def pack(
    library: NativeLibrary, weight: npt.NDArray[Any], *, stored: Stored = Stored.FLOAT32, threads: int = 1
) -> npt.NDArray[Any]:
    packed = np.full(library.packed_size(*weight.shape), 7, dtype=weight.dtype)
    stride = weight.strides[0] // weight.itemsize
    library.pack(stored, weight.ctypes.data, stride, *weight.shape, packed.ctypes.data, threads)
    return packed


def multiply(
    library: NativeLibrary,
    x: Floats,
    packed: npt.NDArray[Any],
    bias: Floats | None,
    *,
    out: int,
    stored: Stored = Stored.FLOAT32,
    threads: int = 1,
    norm: Floats | None = None,
    plus: Floats | None = None,
) -> Floats:
    """Over rows that lie further apart than they are long."""
    rows, size = x.shape
    apart, y = np.full((rows, size + 3), np.nan, dtype=np.float32), np.full((rows, out), np.nan, dtype=np.float32)
    apart[:, :size] = x
    normed = np.full((rows, size), np.nan, dtype=np.float32)
    product = Product(packed.ctypes.data, address(bias), address(norm), out, size, EPS, stored)
    library.product(
        *(ctypes.addressof(product), apart.ctypes.data, size + 3, rows, address(plus)),
        *(None if norm is None else normed.ctypes.data, y.ctypes.data, threads),
    )
    return y


def gated(
    library: NativeLibrary,
    x: Floats,
    pairs: npt.NDArray[Any],
    bias: Floats | None,
    *,
    units: int,
    by: tuple[float, float, float],
    norm: Floats | None = None,
) -> Floats:
    """By a float32 weight, on two threads."""
    rows, size = x.shape
    y, normed = np.full((rows, units), np.nan, dtype=np.float32), np.empty_like(x)
    product, activation = (
        Product(pairs.ctypes.data, address(bias), address(norm), units, size, EPS, Stored.FLOAT32),
        Activation(*by),
    )
    library.gated_product(
        *(ctypes.addressof(product), ctypes.addressof(activation), x.ctypes.data, size, rows),
        *(None if norm is None else normed.ctypes.data, y.ctypes.data, 2),
    )
    return y


def address(array: npt.NDArray[Any] | None) -> int | None:
    """Where it lies, if it does."""
    return None if array is None else array.ctypes.data


def as_normed(x: Floats, weight: Floats) -> npt.NDArray[np.float64]:
    """By the definition, in float64."""
    wide = x.astype(np.float64)
    normed: npt.NDArray[np.float64] = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS) * weight
    return normed


def numbers(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("stored", Stored)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "out", "size"), SIZES)
def test_a_product_is_that_of_the_definition(
    library: NativeLibrary, rows: int, out: int, size: int, with_bias: bool, stored: Stored
) -> None:
    x, bias = numbers(1, rows, size), numbers(3, out) if with_bias else None
    weight = as_stored(numbers(2, out, size), stored)
    found = multiply(library, x, pack(library, weight, stored=stored), bias, out=out, stored=stored)
    wanted = x.astype(np.float64) @ as_read(weight).T + (0 if bias is None else bias)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * size, rtol=1e-5)


@pytest.mark.parametrize(("rows", "out", "size"), [(0, 5, 4), (1, 1, 1), (3, 33, 7), (60, 40, 1000)])
def test_rows_are_normed_before_a_product_and_added_to_others_behind_it(
    library: NativeLibrary, rows: int, out: int, size: int
) -> None:
    x, weight, bias = numbers(1, rows, size), numbers(2, out, size), numbers(3, out)
    norm, plus = numbers(4, size), numbers(5, rows, out)
    kept = plus.copy()
    found = multiply(library, x, pack(library, weight), bias, out=out, threads=2, norm=norm, plus=plus)
    wanted = as_normed(x, norm) @ weight.astype(np.float64).T + bias + plus
    np.testing.assert_allclose(found, wanted, atol=4e-6 * size, rtol=1e-5)
    assert (plus == kept).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_gives_the_same_bits_beside_any_others_and_on_any_number_of_threads(
    library: NativeLibrary, threads: int
) -> None:
    x, weight = numbers(1, 60, 77), numbers(2, 100, 77)
    packed = pack(library, weight, threads=threads)
    assert (packed == pack(library, weight)).all()
    together = multiply(library, x, packed, None, out=100, threads=threads)
    for row in range(60):
        assert (multiply(library, x[row : row + 1], packed, None, out=100) == together[row]).all()


def test_a_weight_whose_rows_lie_apart_is_packed_as_one_whose_rows_do_not(library: NativeLibrary) -> None:
    wide = numbers(1, 20, 50)
    assert (pack(library, wide[:, :30]) == pack(library, np.ascontiguousarray(wide[:, :30]))).all()


def test_a_row_that_holds_no_numbers_spoils_itself_alone(library: NativeLibrary) -> None:
    x, weight = numbers(1, 9, 12), numbers(2, 40, 12)
    packed = pack(library, weight)
    clean = multiply(library, x, packed, None, out=40)
    x[4, 3] = np.nan
    broken = multiply(library, x, packed, None, out=40)
    assert np.isnan(broken[4]).all()
    assert (np.delete(broken, 4, axis=0) == np.delete(clean, 4, axis=0)).all()


@pytest.mark.parametrize("activation", [(1.0, 0.0, math.inf), (1.702, 1.0, 0.8)])
@pytest.mark.parametrize(("rows", "units", "size"), [(0, 5, 4), (1, 1, 1), (3, 15, 9), (14, 16, 8), (60, 33, 20)])
def test_a_gated_product_is_that_of_the_definition(
    library: NativeLibrary, rows: int, units: int, size: int, activation: tuple[float, float, float]
) -> None:
    x, gate, up, bias = numbers(1, rows, size), numbers(2, units, size), numbers(3, units, size), numbers(4, 2 * units)
    packed = np.full(library.packed_pair_size(units, size), np.nan, dtype=np.float32)
    library.pack_pairs(Stored.FLOAT32, gate.ctypes.data, up.ctypes.data, size, units, size, packed.ctypes.data, 2)
    for norm in (None, numbers(5, size)):
        y = gated(library, x, packed, bias, units=units, by=activation, norm=norm)
        wide = x.astype(np.float64) if norm is None else as_normed(x, norm)
        wanted = activated(wide @ gate.T + bias[:units], wide @ up.T + bias[units:], activation)
        np.testing.assert_allclose(y, wanted, atol=1e-5 * size, rtol=1e-5)


def activated(gate: npt.NDArray[np.float64], up: npt.NDArray[np.float64], by: tuple[float, float, float]) -> Any:
    """(up + offset) * gate * sigmoid(alpha * gate) of numbers cut to a limit, in float64."""
    alpha, offset, limit = by
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    with np.errstate(over="ignore"):
        return (up + offset) * gate / (1 + np.exp(-alpha * gate))


@pytest.mark.parametrize("gate", [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 87.5, -87.5, 1000.0, -1000.0, 3e38])
def test_the_activation_holds_at_the_ends_of_what_an_exponential_can_be(library: NativeLibrary, gate: float) -> None:
    one = np.ones((1, 1), dtype=np.float32)
    packed = np.empty(library.packed_pair_size(1, 1), dtype=np.float32)
    library.pack_pairs(Stored.FLOAT32, one.ctypes.data, one.ctypes.data, 1, 1, 1, packed.ctypes.data, 1)
    x, bias = np.zeros((1, 1), dtype=np.float32), np.array([gate, 1.0], dtype=np.float32)
    y = gated(library, x, packed, bias, units=1, by=(1.0, 0.0, math.inf))
    wanted = float(activated(bias[:1].astype(np.float64), np.ones(1), (1.0, 0.0, math.inf))[0])
    np.testing.assert_allclose(y[0, 0], wanted, rtol=1e-6, atol=1e-33)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none_behind_an_activation_with_a_limit(library: NativeLibrary, value: float) -> None:
    one = np.ones((1, 1), dtype=np.float32)
    packed = np.empty(library.packed_pair_size(1, 1), dtype=np.float32)
    library.pack_pairs(Stored.FLOAT32, one.ctypes.data, one.ctypes.data, 1, 1, 1, packed.ctypes.data, 1)
    for bias in ([value, 1.0], [1.0, value]):
        x, both = np.zeros((1, 1), dtype=np.float32), np.array(bias, dtype=np.float32)
        limit = 7.0 if math.isnan(value) else math.inf
        y = gated(library, x, packed, both, units=1, by=(1.0, 0.0, limit))
        assert not np.isfinite(y).any()
