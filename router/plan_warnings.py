"""What runs but may be slower than it looks: groups across hosts, one sentence for an axis of a pool."""

from collections.abc import Iterator

from rich.filesize import decimal

from parallel.crossing import Crossing
from router.config import Config
from router.plan_report import PlanReport

#: The key that makes an axis smaller.
_KEYS = {"attn_cp": "attention.cp", "attn_tp": "attention.tp", "block": "experts.ep"}


def crossing_warnings(report: PlanReport, *, config: Config) -> Iterator[str]:
    """For each axis with groups across hosts: how many, the first, the bytes of a step and what decides it."""
    traffic = {(row.pool, row.axis): row for row in report.traffic}
    for found in report.crossings:
        row = traffic[found.pool, found.axis]
        yield (
            f"pools.{found.pool}: {found.num_crossing} of {found.num_groups} {found.axis} groups cross hosts (first: "
            f"ranks {_few(found.ranks)} of {found.replica} on {_few(found.hosts)}); in a full step each rank sends "
            f"{decimal(row.sent_bytes)} along it, a group {decimal(row.sent_bytes * row.group_size)}; "
            f"{_remedy(found, config=config)}"
        )


def _remedy(found: Crossing, *, config: Config) -> str:
    if found.axis == "pp":
        return "this axis moves least, so it is the one to cross"
    if config.pools.named()[found.pool].hosts:
        return f"pools.{found.pool}.hosts fills its hosts in order: without it groups stay in one host where they can"
    return (
        f"a host with {len(found.ranks)} free devices would hold a group: write a smaller {_KEYS[found.axis]}, "
        "or give hosts more devices"
    )


def _few(items: tuple[object, ...]) -> str:
    shown = [str(item) for item in items]
    return " ".join(shown if len(shown) <= 4 else [*shown[:2], "..", shown[-1]])
