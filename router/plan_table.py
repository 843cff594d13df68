"""Prints a plan for people: one table of ranks, one of groups, one of totals."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.segment import Segments
from rich.table import Table

from router.plan_report import GroupRow, PlanReport, PoolRow, RankRow

_COORDINATES = (
    "pp_rank",
    "attn_dp_rank",
    "attn_cp_rank",
    "attn_tp_rank",
    "moe_dp_rank",
    "moe_ep_rank",
    "moe_tp_rank",
)
_UNBOUNDED = 10_000


def render(report: PlanReport, console: Console) -> None:
    """Prints `report` to `console`."""
    console.print(f"model {report.model}, plan {report.digest}\n", highlight=False)
    # A file or a pipe has no width to keep to: rich's guess of 80 columns would fold names for a reader like grep.
    options = console.options if console.is_terminal else console.options.update(width=_UNBOUNDED)
    for table in (_rank_table(report.ranks), _group_table(report.groups), _pool_table(report.pools)):
        console.print(Segments(console.render(table, options)), crop=False)
        console.print()


def _rank_table(rows: Sequence[RankRow]) -> Table:
    """The coordinates' headers break after their axis, so that all of them fit a terminal."""
    headers = [name.removesuffix("_rank").replace("_", "\n") for name in _COORDINATES]
    table = _table("ranks", text=["pool", "host", "device"], numbers=["rank", *headers, "weights", "KV"])
    for row in rows:
        coordinates = [_coordinate(getattr(row, name)) for name in _COORDINATES]
        table.add_row(
            f"{row.pool}/{row.replica}",
            row.host,
            row.device,
            str(row.global_rank),
            *coordinates,
            decimal(row.weight_bytes),
            decimal(row.kv_bytes),
        )
    return table


def _group_table(rows: Sequence[GroupRow]) -> Table:
    """One line for each axis of a replica, its groups in brackets."""
    table = _table("groups", text=["pool", "axis", "ranks"], numbers=[])
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((f"{row.pool}/{row.replica}", row.axis), []).append(f"({' '.join(map(str, row.ranks))})")
    for (replica, axis), groups in lines.items():
        table.add_row(replica, axis, " ".join(groups))
    return table


def _pool_table(rows: Sequence[PoolRow]) -> Table:
    numbers = ["replicas", "ranks of\neach", "page\nsize", "longest\nsequence", "context of\neach", "weights", "KV"]
    table = _table("totals", text=["pool", "dtype"], numbers=numbers)
    for row in rows:
        counts = (row.replicas, row.ranks_per_replica, row.page_size, row.sequence_tokens)
        table.add_row(
            row.pool,
            row.dtype,
            *map(str, counts),
            str(row.context_tokens_per_replica),
            decimal(row.weight_bytes),
            decimal(row.kv_bytes),
        )
    return table


def _table(title: str, *, text: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for header in text:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _coordinate(value: int | None) -> str:
    return "-" if value is None else str(value)
