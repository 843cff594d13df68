"""Pages of sequences as columns of numbers: on the wire and in tables. A message for each page would cost a microsecond
of Python each, and a long prompt has tens of thousands.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PageColumns:
    """Pages in order: of each the cp rank that owns it, and its number there; int32 [n]."""

    cp_ranks: Column
    pages: Column

    def __len__(self) -> int:
        return len(self.pages)


def column(packed: bytes) -> Column:
    """A column as the wire has it: little-endian int32."""
    return np.frombuffer(packed, dtype="<i4")


def packed(values: Iterable[int] | npt.ArrayLike) -> bytes:
    """The inverse of `column`."""
    return np.asarray(values, dtype="<i4").tobytes()
