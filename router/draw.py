"""`router draw`: a topology as one SVG picture. Pools and their hand-off on top, then hosts and devices, then a key."""

from collections.abc import Iterator, Sequence
from math import sqrt

from rich.filesize import decimal

from parallel.models.description import ModelDescription
from parallel.topology import HostSpec, Topology
from parallel.traffic import handoff_bytes_per_token
from router.draw_hosts import HostPainter
from router.draw_key import paint_key
from router.draw_pools import paint_pools
from router.draw_style import LARGE, MARGIN, MOST_DEVICES, MOST_LARGE_RANKS, SMALL, counted
from router.svg import Box, Drawing

_TITLE = 18.0
_LEAST_WIDTH = 760.0
#: Width over height that the hosts are arranged for.
_ASPECT = 1.7


def draw(topology: Topology, *, description: ModelDescription) -> str:
    """The text of an SVG file."""
    num_ranks = sum(replica.shape.world_size for replica in topology.replicas)
    painter = HostPainter(topology=topology, scale=LARGE if num_ranks <= MOST_LARGE_RANKS else SMALL)
    drawing = Drawing()
    counts = f"{counted(num_ranks, 'rank')}, {counted(len(topology.hosts), 'host')}"
    title = f"{topology.model}: {counts}, plan {topology.digest}"
    drawing.text(title, x=MARGIN, y=MARGIN + _TITLE, size=_TITLE, bold=True)
    handoff = _handoff_words(topology, description=description)
    pools = paint_pools(drawing, topology, x=MARGIN, y=MARGIN + 2 * _TITLE, handoff=handoff)
    drawn = _drawn(topology)
    hosts = _paint_hosts(drawing, painter, drawn, y=pools.bottom + MARGIN, least_width=pools.width)
    bottom = hosts.bottom
    left_out = len(topology.hosts) - len(drawn)
    if left_out:
        bottom += MARGIN
        drawing.text(f"and {counted(left_out, 'more host')}", x=MARGIN, y=bottom, size=_TITLE)
    key = paint_key(drawing, painter, x=MARGIN, y=bottom + MARGIN)
    right = max(pools.right, hosts.right, key.right, MARGIN + len(title) * _TITLE * 0.66)
    return drawing.to_text(width=right + MARGIN, height=key.bottom + MARGIN)


def _drawn(topology: Topology) -> Sequence[HostSpec]:
    """Every host; of very many, the first few that each pool uses."""
    if sum(len(host.devices) for host in topology.hosts) <= MOST_DEVICES:
        return topology.hosts
    pools = dict.fromkeys(replica.pool for replica in topology.replicas)
    shown = {name for pool in pools for name in _first_hosts(topology, pool=pool, most=MOST_DEVICES // len(pools))}
    return [host for host in topology.hosts if host.name in shown]


def _first_hosts(topology: Topology, *, pool: str, most: int) -> Iterator[str]:
    """The hosts of `pool` in the order of its ranks, until they have `most` devices; one at least."""
    names = dict.fromkeys(name for replica in topology.pool(pool) for name in replica.hosts)
    devices = 0
    for name in names:
        yield name
        devices += len(topology.host(name).devices)
        if devices >= most:
            return


def _handoff_words(topology: Topology, *, description: ModelDescription) -> str:
    prefill, decode = topology.pool("prefill"), topology.pool("decode")
    if not prefill or not decode:
        return ""
    count = handoff_bytes_per_token(
        description, source=prefill[0].shape, target=decode[0].shape, settings=prefill[0].engine
    )
    return f"{decimal(count)} a prompt token"


def _paint_hosts(
    drawing: Drawing, painter: HostPainter, hosts: Sequence[HostSpec], *, y: float, least_width: float
) -> Box:
    """Lines of hosts in their order, about as wide as a page; returns what they cover."""
    gap = painter.scale.gap * 2
    sizes = [painter.size(host) for host in hosts]
    area = sum((width + gap) * (height + gap) for width, height in sizes)
    widest = max(sqrt(area * _ASPECT), least_width, _LEAST_WIDTH, *(width for width, _ in sizes))
    left, top, line, right = MARGIN, y, 0.0, MARGIN
    for host, (width, height) in zip(hosts, sizes, strict=True):
        if left > MARGIN and left + width > MARGIN + widest:
            left, top, line = MARGIN, top + line + gap, 0.0
        painter.paint(drawing, host, x=left, y=top)
        left, line, right = left + width + gap, max(line, height), max(right, left + width)
    return Box(x=MARGIN, y=y, width=right - MARGIN, height=top + line - y)
