"""Draws hosts: boxes with a cell for each device, framed by replica, with a coloured strip for each axis."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from parallel.topology import HostSpec, ReplicaPlan, Topology
from router.draw_style import (
    CROSSING_COLOR,
    FREE_COLORS,
    LAYER_AXES,
    POOL_COLORS,
    STRIPS,
    Scale,
    group_color,
    text_color,
)
from router.svg import LETTER, Box, Drawing

_MOST_CELLS_A_ROW = 8

#: Who runs on a device: a replica and the global rank there.
Tenant = tuple[ReplicaPlan, int]


@dataclass(frozen=True, kw_only=True)
class HostPainter:
    """Measures and paints the hosts of one topology in one scale."""

    topology: Topology
    scale: Scale

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes that have a strip: those along which some replica has two ranks or more."""
        shapes = {replica.pool: replica.shape for replica in self.topology.replicas}.values()
        return tuple(
            axis
            for axis in STRIPS
            if any(axis in shape.axes and len(shape.first_group(axis).ranks) > 1 for shape in shapes)
        )

    def size(self, host: HostSpec) -> tuple[float, float]:
        """Width and height of a host's box."""
        scale, count = self.scale, len(host.devices)
        columns, rows = min(count, _MOST_CELLS_A_ROW), -(-count // _MOST_CELLS_A_ROW)
        cells = max(columns * scale.cell_width, self._name_width(host))
        return cells + 2 * scale.gap, self._head + rows * (self._row_height + scale.gap) + scale.gap / 2

    def paint(self, drawing: Drawing, host: HostSpec, *, x: float, y: float) -> None:
        """Draws `host` with its upper left corner at x, y."""
        scale = self.scale
        width, height = self.size(host)
        box = Box(x=x, y=y, width=width, height=height)
        drawing.rect(box, fill="#f3f4f6", stroke="#6b7280", radius=6, title=f"host {host.name} at {host.address}")
        drawing.text(host.name, x=x + scale.gap, y=y + self._head - 5, size=scale.label_text + 1, bold=True)
        for row, devices in enumerate(_rows(host.devices)):
            top = y + self._head + row * (self._row_height + scale.gap)
            self._paint_row(drawing, host, devices, x=x + scale.gap, y=top)

    def _paint_row(self, drawing: Drawing, host: HostSpec, devices: Sequence[int], *, x: float, y: float) -> None:
        """Neighbouring devices of one replica have one frame and one name."""
        width = self.scale.cell_width
        for replica, together in groupby(devices, key=lambda device: self._replica_at(host, device)):
            run = list(together)
            frame = Box(x=x, y=y, width=width * len(run), height=self._row_height)
            self._paint_frame(drawing, frame.inset(1), replica)
            for index, device in enumerate(run):
                cell = Box(x=x + index * width, y=y + self._label, width=width, height=self._row_height - self._label)
                self._paint_cell(drawing, cell.inset(3 if not self.scale.is_small else 2), host, device)
            x = frame.right

    def _paint_frame(self, drawing: Drawing, frame: Box, replica: ReplicaPlan | None) -> None:
        size = self.scale.label_text
        if replica is None:
            fill, stroke = FREE_COLORS
            drawing.rect(frame, fill=fill, stroke=stroke, radius=3, dashes="3 2")
            drawing.text("free", x=frame.x + 3, y=frame.y + size, size=size, color="#888")
            return
        fill, stroke = POOL_COLORS[replica.pool]
        drawing.rect(frame, fill=fill, stroke=stroke, radius=3, title=replica.name)
        fits = len(replica.name) * size * LETTER < frame.width
        name = replica.name if fits else f"{replica.pool[0]}{replica.index}"
        drawing.text(name, x=frame.x + 3, y=frame.y + size, size=size, color=stroke, bold=True)

    def _paint_cell(self, drawing: Drawing, cell: Box, host: HostSpec, device: int) -> None:
        tenant = self._tenants.get((host.name, device))
        title = f"{host.name} {host.device}:{device}"
        scale = self.scale
        if tenant is None:
            drawing.rect(cell, fill="white", stroke=FREE_COLORS[1], title=f"{title}: free")
            return
        replica, rank = tenant
        drawing.rect(cell, fill="white", stroke="#9ca3af", title=f"{title}: rank {rank} of {replica.name}")
        words = str(rank) if scale.is_small else f"rank {rank}"
        drawing.text(
            words, x=cell.x + cell.width / 2, y=cell.y + scale.rank_text + 1, size=scale.rank_text, anchor="middle"
        )
        for index, axis in enumerate(self._strips_of(replica)):
            top = cell.y + scale.rank_text + 5 + index * scale.strip_height
            strip = Box(x=cell.x + 1, y=top, width=cell.width - 2, height=scale.strip_height - 1)
            self._paint_strip(drawing, strip, replica, rank=rank, axis=axis)

    def _paint_strip(self, drawing: Drawing, strip: Box, replica: ReplicaPlan, *, rank: int, axis: str) -> None:
        index = self._group_index.get((replica.pool, axis), {}).get(rank)
        if index is None:
            return
        shape = replica.shape
        ranks = shape.group_of(rank, axis).ranks
        color = group_color(replica.index * shape.num_groups(axis) + index)
        is_apart = axis in LAYER_AXES and len({replica.placements[other].host for other in ranks}) > 1
        title = f"{axis}: ranks {' '.join(map(str, ranks))} of {replica.name}{', across hosts' if is_apart else ''}"
        drawing.rect(strip, fill=color, stroke=CROSSING_COLOR if is_apart else "none", title=title)
        if not self.scale.is_small:
            size = strip.height * 0.66
            words = _fitting(f"{axis}: ", ranks, room=int(strip.width / (size * LETTER)))
            drawing.text(
                words,
                x=strip.x + 3,
                y=strip.bottom - strip.height * 0.27,
                size=size,
                color=text_color(color),
                bold=True,
            )

    def _strips_of(self, replica: ReplicaPlan) -> Sequence[str]:
        """Where colours have no words a strip is known by its place; else a pool has its own strips only."""
        if self.scale.is_small:
            return self.axes
        return [axis for axis in self.axes if self._group_index.get((replica.pool, axis))]

    def _replica_at(self, host: HostSpec, device: int) -> ReplicaPlan | None:
        tenant = self._tenants.get((host.name, device))
        return tenant[0] if tenant else None

    @cached_property
    def _tenants(self) -> Mapping[tuple[str, int], Tenant]:
        return {
            (place.host, place.device): (replica, rank)
            for replica in self.topology.replicas
            for rank, place in enumerate(replica.placements)
        }

    @cached_property
    def _group_index(self) -> Mapping[tuple[str, str], Mapping[int, int]]:
        """By pool and axis, the index of each rank's group; nothing where groups have one rank."""
        shapes = {replica.pool: replica.shape for replica in self.topology.replicas}
        return {
            (pool, axis): {
                rank: index
                for index, group in enumerate(shape.groups(axis))
                if len(group.ranks) > 1
                for rank in group.ranks
            }
            for pool, shape in shapes.items()
            for axis in self.axes
            if axis in shape.axes
        }

    @property
    def _head(self) -> float:
        return self.scale.label_text + 10

    @property
    def _label(self) -> float:
        return self.scale.label_text + 3

    @cached_property
    def _num_strips(self) -> int:
        firsts = {replica.pool: replica for replica in self.topology.replicas}.values()
        return max(len(self._strips_of(replica)) for replica in firsts)

    @property
    def _row_height(self) -> float:
        return self._label + self.scale.rank_text + 12 + self._num_strips * self.scale.strip_height

    def _name_width(self, host: HostSpec) -> float:
        return len(host.name) * (self.scale.label_text + 1) * LETTER * 1.1


def _rows(devices: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(devices), _MOST_CELLS_A_ROW):
        yield devices[first : first + _MOST_CELLS_A_ROW]


def _fitting(prefix: str, ranks: Sequence[int], *, room: int) -> str:
    """`prefix` with all ranks, or with the first and the last where there is no room for all."""
    prefix = prefix.removeprefix("attn_")
    words = prefix + " ".join(map(str, ranks))
    return words if len(words) <= room else f"{prefix}{ranks[0]}..{ranks[-1]}"
