"""Prints a plan for people: tables of ranks, groups, what moves in a step, and totals.

A plan of many ranks has one line for all ranks that are alike, and counts groups instead of listing them.
"""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.segment import Segments
from rich.table import Table

from router.machines import DealtCores
from router.plan_report import GroupRow, PlanReport, PoolRow, RankRow, StorageRow, TrafficRow

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
#: A plan of more ranks than these is summed up.
MOST_RANKS = 64


def render(report: PlanReport, console: Console, *, every_rank: bool = False) -> None:
    """Prints `report` to `console`, summed up where it is large, unless `every_rank` is asked for."""
    console.print(f"model {report.topology.model}, plan {report.topology.digest}\n", highlight=False)
    # A file or a pipe has no width to keep to: rich's guess of 80 columns would fold names for a reader like grep.
    options = console.options if console.is_terminal else console.options.update(width=_UNBOUNDED)
    for table in _tables(report, every_rank=every_rank or len(report.ranks) <= MOST_RANKS):
        console.print(Segments(console.render(table, options)), crop=False)
        console.print()
    if report.hosts_without_cores:
        hosts = _some(report.hosts_without_cores)
        console.print(
            f"cores of {hosts}: dealt, and logged, when their launchers have said what they have", highlight=False
        )
    if report.handoff_bytes is not None:
        console.print(f"hand-off: {decimal(report.handoff_bytes)} of KV for each prompt token", highlight=False)


def _tables(report: PlanReport, *, every_rank: bool) -> Sequence[Table]:
    if every_rank:
        ranks, groups = _rank_table(report.ranks), _group_table(report.groups)
    else:
        ranks, groups = _like_ranks_table(report.ranks), _group_count_table(report)
    return (
        ranks,
        *([_cores_table(report.cores)] if report.cores else []),
        groups,
        _storage_table(report.storage),
        _traffic_table(report.traffic),
        _pool_table(report.pools),
    )


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


def _like_ranks_table(rows: Sequence[RankRow]) -> Table:
    """One line for the ranks of a pool's stage, which hold the same number of bytes."""
    table = _table("ranks", text=["pool", "stage"], numbers=["ranks", "hosts", "weights\nof each", "KV\nof each"])
    like: dict[tuple[str, int, int, int], Counter[str]] = {}
    for row in rows:
        key = (row.pool, row.pp_rank, row.weight_bytes, row.kv_bytes)
        like.setdefault(key, Counter())[row.host] += 1
    for (pool, pp_rank, weight_bytes, kv_bytes), hosts in like.items():
        counts = (str(hosts.total()), str(len(hosts)))
        table.add_row(pool, f"pp {pp_rank}", *counts, decimal(weight_bytes), decimal(kv_bytes))
    return table


def _cores_table(parts: Sequence[DealtCores]) -> Table:
    numbers = ["cores", "ranks", "threads\nof each"]
    table = _table("cores", text=["host", "pool"], numbers=numbers)
    table.add_column("kept to")
    for part in parts:
        counts = (part.machine.num_cores, len(part.cores), part.num_threads)
        table.add_row(part.host, part.pool, *map(str, counts), _kept_to(part))
    return table


def _kept_to(part: DealtCores) -> str:
    """How many ranks are on which NUMA nodes."""
    nodes = Counter(cores.nodes for cores in part.cores.values())
    words = [f"{count} to node{'s'[: len(place) > 1]} {_some(place)}" for place, count in nodes.items() if place]
    return ", ".join(words) or "nothing"


def _group_table(rows: Sequence[GroupRow]) -> Table:
    """One line for each axis of a replica, its groups in brackets."""
    table = _table("groups", text=["pool", "axis", "ranks"], numbers=[])
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((f"{row.pool}/{row.replica}", row.axis), []).append(f"({' '.join(map(str, row.ranks))})")
    for (replica, axis), groups in lines.items():
        table.add_row(replica, axis, " ".join(groups))
    return table


def _group_count_table(report: PlanReport) -> Table:
    """One line for each axis of a pool: how many groups of which size, and the first of them."""
    table = _table("groups", text=["pool", "axis"], numbers=["groups", "ranks of\neach", "across\nhosts"])
    table.add_column("the first")
    crossing = {(found.pool, found.axis): found.num_crossing for found in report.crossings}
    for pool in report.pools:
        shape = report.topology.pool(pool.pool)[0].shape
        for axis in shape.axes:
            ranks = shape.first_group(axis).ranks
            count = pool.replicas * shape.num_groups(axis)
            crossing_count = crossing.get((pool.pool, axis), 0)
            table.add_row(pool.pool, axis, str(count), str(len(ranks)), str(crossing_count), _some(ranks))
    return table


def _storage_table(rows: Sequence[StorageRow]) -> Table:
    """What each rank keeps of tokens, by what attention sees of them."""
    numbers = ["layers", "pages", "tokens", "a token", "in all"]
    table = _table("KV of a rank, of the stage that has most", text=["pool", "attention sees"], numbers=numbers)
    for row in rows:
        sees = f"the last {row.window} tokens" if row.window else "everything"
        counts = (row.layers, row.pages, row.tokens)
        table.add_row(row.pool, sees, *map(str, counts), decimal(row.token_bytes), decimal(row.num_bytes))
    return table


def _traffic_table(rows: Sequence[TrafficRow]) -> Table:
    numbers = ["tokens\na step", "ranks of\na group", "sent by\na rank"]
    table = _table("moved in a full step, at most", text=["pool", "axis"], numbers=numbers)
    table.add_column("what")
    for row in rows:
        counts = (str(row.step_tokens), str(row.group_size))
        cached = f"; {decimal(row.cached_bytes)} more for each 1000 cached tokens" if row.cached_bytes else ""
        table.add_row(row.pool, row.axis, *counts, decimal(row.sent_bytes), row.what + cached)
    return table


def _pool_table(rows: Sequence[PoolRow]) -> Table:
    numbers = ["replicas", "ranks of\neach", "page\nsize", "longest\nsequence"]
    numbers += ["context of\neach", "context\nin all", "weights", "KV", "shared by\ngroups", "exchange\nof a rank"]
    table = _table("totals", text=["pool", "dtype"], numbers=numbers)
    for row in rows:
        counts = (row.replicas, row.ranks_per_replica, row.page_size, row.sequence_tokens)
        contexts = (row.context_tokens_per_replica, row.context_tokens)
        sizes = map(decimal, (row.weight_bytes, row.kv_bytes, row.group_bytes, row.exchange_bytes))
        table.add_row(row.pool, row.dtype, *map(str, counts + contexts), *sizes)
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


def _some(items: Sequence[object]) -> str:
    shown = [str(item) for item in items]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "..", shown[-1]])
