"""What every backend asks of the rows that it plans, before a kernel reads memory that is not its own."""

from attention.interface import AttentionRows, PageTables


def check_rows(rows: AttentionRows, *, tables: PageTables, page_size: int) -> None:
    """Raises ValueError naming the first entry that contradicts itself or reads beyond its table."""
    num_pages = -(-rows.kv_len // page_size)
    height, width = tables.host.shape
    is_wrong = (rows.num_rows < 0) | (rows.kv_len < 0) | (rows.causal & (rows.kv_len < rows.num_rows))
    is_wrong |= (num_pages > 0) & (
        (rows.table_row < 0)
        | (rows.table_row >= height)
        | (rows.first_page < 0)
        | (rows.first_page + num_pages > width)
    )
    if not is_wrong.any():
        return
    place = int(is_wrong.argmax())
    num_rows, kv_len = int(rows.num_rows[place]), int(rows.kv_len[place])
    if num_rows < 0 or kv_len < 0:
        raise ValueError(f"rows[{place}]: num_rows {num_rows} and kv_len {kv_len} must not be negative")
    if rows.causal[place] and kv_len < num_rows:
        raise ValueError(f"rows[{place}]: {num_rows} causal rows must be the last of their KV, but kv_len is {kv_len}")
    raise ValueError(
        f"rows[{place}]: kv_len {kv_len} at page size {page_size} takes {num_pages[place]} pages of row "
        f"{rows.table_row[place]} from column {rows.first_page[place]} on, but the tables are {height} x {width}"
    )
