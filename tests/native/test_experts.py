"""All experts of a layer in one call, against plain loops in float64."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from native.library import Activation, Expert, Experts, NativeLibrary, Stored
from tests.native.test_products import DTYPES, activated, address, as_read, as_stored, numbers

Floats = npt.NDArray[np.float32]
SWIGLU, CLAMPED = (1.0, 0.0, math.inf), (1.702, 1.0, 0.7)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights of `count` experts, those of slots `first` on, with biases or none."""

    first: int
    count: int
    width: int
    units: int
    with_biases: bool
    stored: Stored = Stored.FLOAT32

    def weights(self, expert: int) -> tuple[npt.NDArray[Any], ...]:
        """gate, up, down, bias of gates and ups, bias of down."""
        gate, up = numbers(10 * expert, self.units, self.width), numbers(10 * expert + 1, self.units, self.width)
        down = numbers(10 * expert + 2, self.width, self.units)
        gate, up, down = (as_stored(part, self.stored) for part in (gate, up, down))
        return gate, up, down, numbers(10 * expert + 3, 2 * self.units), numbers(10 * expert + 4, self.width)

    def run(
        self,
        library: NativeLibrary,
        x: Floats,
        slots: npt.NDArray[np.int64],
        shares: Floats,
        *,
        by: tuple[float, ...],
        threads: int = 1,
        plus: Floats | None = None,
    ) -> Floats:
        """The library's answer."""
        kept, entries = [], []
        for expert in range(self.count):
            gate, up, down, gated_bias, down_bias = self.weights(expert)
            pairs = np.empty(library.packed_pair_size(self.units, self.width), dtype=DTYPES[self.stored])
            packed = np.empty(library.packed_size(self.width, self.units), dtype=DTYPES[self.stored])
            library.pack_pairs(
                self.stored, gate.ctypes.data, up.ctypes.data, self.width, self.units, self.width, pairs.ctypes.data, 1
            )
            library.pack(self.stored, down.ctypes.data, self.units, self.width, self.units, packed.ctypes.data, 1)
            kept.append((pairs, packed, gated_bias, down_bias))
            biases = (gated_bias.ctypes.data, down_bias.ctypes.data) if self.with_biases else (None, None)
            entries.append(Expert(pairs.ctypes.data, biases[0], packed.ctypes.data, biases[1]))
        hidden = np.full((slots.size, self.units), np.nan, dtype=np.float32)
        out = np.full((len(x), self.width), np.nan, dtype=np.float32)
        each, choices, messages = (Expert * self.count)(*entries), slots.shape[1], as_messages(x, slots, shares)
        experts = Experts(
            *(ctypes.addressof(each), self.first, self.count, self.width, self.units, choices),
            *(Activation(*by), self.stored),
        )
        library.experts(
            *(ctypes.addressof(experts), messages.ctypes.data, self.width + 2 * choices, len(x), address(plus)),
            *(hidden.ctypes.data, out.ctypes.data, threads),
        )
        return out

    def reference(self, x: Floats, slots: npt.NDArray[np.int64], shares: Floats, *, by: tuple[float, ...]) -> Floats:
        """Row by row, choice by choice."""
        out = np.zeros((len(x), self.width))
        for row, choices in enumerate(slots.tolist()):
            for choice, slot in enumerate(choices):
                if self.first <= slot < self.first + self.count:
                    gate, up, down, gated_bias, down_bias = self.weights(slot - self.first)
                    used = float(self.with_biases)
                    h = activated(
                        as_read(gate) @ x[row].astype(np.float64) + used * gated_bias[: self.units],
                        as_read(up) @ x[row].astype(np.float64) + used * gated_bias[self.units :],
                        (by[0], by[1], by[2]),
                    )
                    out[row] += shares[row, choice] * (as_read(down) @ h + used * down_bias)
        return out.astype(np.float32)


def as_messages(x: Floats, slots: npt.NDArray[np.int64], shares: Floats) -> Floats:
    """Rows as a gate leaves them."""
    return np.concatenate([x, slots.astype(np.int32).view(np.float32), shares], axis=1)


@pytest.mark.parametrize("stored", Stored)
@pytest.mark.parametrize("by", [SWIGLU, CLAMPED])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize(("rows", "choices"), [(0, 2), (1, 1), (1, 3), (9, 2), (60, 4)])
@pytest.mark.parametrize(("width", "units"), [(1, 1), (20, 7), (33, 17), (64, 48)])
def test_the_sum_over_experts_is_that_of_the_definition(
    library: NativeLibrary,
    rows: int,
    choices: int,
    width: int,
    units: int,
    with_biases: bool,
    by: tuple[float, ...],
    stored: Stored,
) -> None:
    layer = Layer(first=2, count=4, width=width, units=units, with_biases=with_biases, stored=stored)
    x, shares = numbers(99, rows, width), numbers(98, rows, choices)
    # Slots of this rank and of others, and of padding; a row may choose none here, and all rows the same one.
    slots = np.random.default_rng(rows).integers(-1, 8, (rows, choices))
    found = layer.run(library, x, slots, shares, by=by, threads=2)
    np.testing.assert_allclose(found, layer.reference(x, slots, shares, by=by), atol=2e-5 * units, rtol=2e-5)
    plus = numbers(97, rows, width)
    assert (layer.run(library, x, slots, shares, by=by, plus=plus) == found + plus).all()


def test_a_row_gives_the_same_bits_beside_any_others_and_on_any_number_of_threads(library: NativeLibrary) -> None:
    layer = Layer(first=0, count=5, width=40, units=50, with_biases=True)
    x, shares = numbers(1, 30, 40), numbers(2, 30, 3)
    slots = np.random.default_rng(3).integers(0, 5, (30, 3))
    together = layer.run(library, x, slots, shares, by=SWIGLU, threads=3)
    for row in range(30):
        alone = layer.run(library, x[row : row + 1], slots[row : row + 1], shares[row : row + 1], by=SWIGLU)
        assert (alone[0] == together[row]).all()


def test_all_rows_of_one_expert_leave_the_others_unread(library: NativeLibrary) -> None:
    layer = Layer(first=0, count=3, width=16, units=16, with_biases=False)
    x, shares = numbers(1, 50, 16), np.ones((50, 1), dtype=np.float32)
    slots = np.full((50, 1), 1)
    found = layer.run(library, x, slots, shares, by=SWIGLU, threads=2)
    np.testing.assert_allclose(found, layer.reference(x, slots, shares, by=SWIGLU), atol=1e-4)


def test_the_entries_of_experts_are_as_the_library_reads_them() -> None:
    assert ctypes.sizeof(Expert) == 4 * ctypes.sizeof(ctypes.c_void_p)
