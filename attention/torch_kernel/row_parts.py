"""Which entries of a plan are short and which long: each kind has a kernel of its own on a CPU."""

from dataclasses import dataclass

import numpy as np

from attention.interface import AttentionRows
from parallel.arrays import Ints

MAX_SHORT_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class RowParts:
    """The entries that see something, by their number of rows, each kind with its first rows in q.

    `every_row_sees` where no other entry has rows.
    """

    short: AttentionRows
    short_starts: Ints
    long: AttentionRows
    long_starts: Ints
    every_row_sees: bool


def part_rows(rows: AttentionRows) -> RowParts:
    """Parts `rows` at MAX_SHORT_ROWS."""
    sees = (rows.num_rows > 0) & (rows.kv_len > 0)
    is_short = sees & (rows.num_rows <= MAX_SHORT_ROWS)
    is_long, starts = sees & ~is_short, rows.starts
    return RowParts(
        short=rows.take(is_short),
        short_starts=starts[is_short],
        long=rows.take(is_long),
        long_starts=starts[is_long],
        every_row_sees=bool(np.all(sees | (rows.num_rows == 0))),
    )
