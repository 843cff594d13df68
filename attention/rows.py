"""What every backend asks of the rows that it plans: checks, page counts and where each entry starts in q."""

from collections.abc import Sequence
from itertools import accumulate

from attention.interface import AttentionRows


def num_pages(kv_len: int, *, page_size: int) -> int:
    """Pages that hold `kv_len` positions."""
    return -(-kv_len // page_size)


def row_starts(rows: Sequence[AttentionRows]) -> list[int]:
    """The first row in q of each entry, and after the last entry the total; always one longer than `rows`."""
    return list(accumulate((entry.num_rows for entry in rows), initial=0))


def check_rows(rows: Sequence[AttentionRows], *, page_size: int) -> None:
    """Raises ValueError where an entry contradicts itself, before a kernel reads memory that is not its own."""
    for position, entry in enumerate(rows):
        _check_entry(entry, position=position, page_size=page_size)


def _check_entry(entry: AttentionRows, *, position: int, page_size: int) -> None:
    if entry.num_rows < 0 or entry.kv_len < 0:
        raise ValueError(f"rows[{position}]: num_rows {entry.num_rows} and kv_len {entry.kv_len} must not be negative")
    needed = num_pages(entry.kv_len, page_size=page_size)
    if len(entry.page_table) != needed:
        raise ValueError(
            f"rows[{position}]: kv_len {entry.kv_len} at page size {page_size} takes {needed} pages, "
            f"but page_table lists {len(entry.page_table)}"
        )
    if entry.causal and entry.kv_len < entry.num_rows:
        raise ValueError(
            f"rows[{position}]: {entry.num_rows} causal rows must be the last of their KV, but kv_len is {entry.kv_len}"
        )
