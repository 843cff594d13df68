"""Draws pools: a box for each with its sizes and a chip for each replica, and the arrows of the hand-off."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.topology import ReplicaPlan, Topology
from router.draw_style import POOL_COLORS, counted
from router.svg import LETTER, Box, Drawing

_TEXT = 13.0
_CHIP_HEIGHT = 40.0
_GAP = 10.0
_ARROW_ROOM = 210.0
#: With more replicas in a pool than these, chips are small and one arrow stands for every pair.
_MOST_LARGE = 4
_SMALL_CHIP = (40.0, 18.0)
_SMALL_COLUMNS = 16
_MOST_CHIPS = 64


@dataclass(frozen=True, kw_only=True)
class PoolBox:
    """Where a pool is drawn, and each of its replicas that has a chip of its own."""

    replicas: Sequence[ReplicaPlan]
    box: Box
    chips: Sequence[Box]


def paint_pools(drawing: Drawing, topology: Topology, *, x: float, y: float, handoff: str) -> Box:
    """Draws every pool side by side from x, y, and `handoff` in words over its arrows; returns what they cover."""
    names = dict.fromkeys(replica.pool for replica in topology.replicas)
    boxes: list[PoolBox] = []
    left = x
    for name in names:
        placed = _place(topology.pool(name), x=left, y=y)
        boxes.append(placed)
        left = placed.box.right + _ARROW_ROOM
    for placed in boxes:
        _paint(drawing, placed)
    if len(boxes) > 1:
        _paint_handoff(drawing, boxes[0], boxes[1], handoff=handoff)
    return Box(x=x, y=y, width=boxes[-1].box.right - x, height=max(placed.box.height for placed in boxes))


def _place(replicas: Sequence[ReplicaPlan], *, x: float, y: float) -> PoolBox:
    is_small = len(replicas) > _MOST_LARGE
    words = max(len(line) for line in _lines(replicas)) * _TEXT * LETTER
    width, height = _SMALL_CHIP if is_small else (words, _CHIP_HEIGHT)
    columns = min(len(replicas), _SMALL_COLUMNS) if is_small else 1
    gap = _GAP / 2 if is_small else _GAP
    head = 3 * (_TEXT + 6) + _GAP
    chips = [
        Box(x=x + _GAP + column * (width + gap), y=y + head + row * (height + gap), width=width, height=height)
        for row, column in (divmod(index, columns) for index in range(min(len(replicas), _MOST_CHIPS)))
    ]
    right = max(words, columns * (width + gap) - gap)
    bottom = max(chip.bottom for chip in chips) + (_TEXT + 6 if len(replicas) > len(chips) else 0)
    return PoolBox(
        replicas=replicas,
        box=Box(x=x, y=y, width=right + 2 * _GAP, height=bottom + _GAP - y),
        chips=chips,
    )


def _lines(replicas: Sequence[ReplicaPlan]) -> tuple[str, str, str]:
    """A pool's title and the sizes of its two meshes."""
    shape = replicas[0].shape
    attention, experts = shape.attention, shape.experts
    count = f"{counted(len(replicas), 'replica')} of {counted(shape.world_size, 'rank')}"
    return (
        f"{replicas[0].pool}: {count}",
        f"pp {shape.pp} x attention dp {attention.dp}, cp {attention.cp}, tp {attention.tp}",
        f"experts moe_dp {experts.moe_dp}, ep {experts.ep}, moe_tp {experts.moe_tp}" if experts else "no experts",
    )


def _paint(drawing: Drawing, placed: PoolBox) -> None:
    fill, stroke = POOL_COLORS[placed.replicas[0].pool]
    drawing.rect(placed.box, fill=fill, stroke=stroke, radius=8)
    for index, line in enumerate(_lines(placed.replicas)):
        y = placed.box.y + (index + 1) * (_TEXT + 6)
        drawing.text(
            line, x=placed.box.x + _GAP, y=y, size=_TEXT, color=stroke if index == 0 else "#222", bold=index == 0
        )
    is_small = len(placed.replicas) > _MOST_LARGE
    for replica, chip in zip(placed.replicas, placed.chips, strict=False):
        hosts = replica.hosts
        drawing.rect(chip, fill="white", stroke=stroke, radius=4, title=f"{replica.name} on {', '.join(hosts)}")
        middle = chip.x + chip.width / 2
        if is_small:
            drawing.text(str(replica.index), x=middle, y=chip.y + 13, size=11, anchor="middle")
            continue
        drawing.text(replica.name, x=middle, y=chip.y + 17, size=_TEXT, anchor="middle", bold=True)
        where = hosts[0] if len(hosts) == 1 else f"{hosts[0]} .. {hosts[-1]} ({len(hosts)})"
        drawing.text(f"on {where}", x=middle, y=chip.y + 33, size=11, anchor="middle")
    left_out = len(placed.replicas) - len(placed.chips)
    if left_out:
        drawing.text(f"and {left_out} more", x=placed.box.x + _GAP, y=placed.box.bottom - _GAP, size=_TEXT)


def _paint_handoff(drawing: Drawing, source: PoolBox, target: PoolBox, *, handoff: str) -> None:
    """One arrow a pair of replicas, or one for the pools where either has many; the words are above."""
    middle = (source.box.right + target.box.x) / 2
    drawing.text("hand-off", x=middle, y=source.box.y + _TEXT, size=_TEXT, anchor="middle", bold=True)
    drawing.text(handoff, x=middle, y=source.box.y + 2 * _TEXT + 4, size=11, anchor="middle")
    if max(len(source.replicas), len(target.replicas)) > _MOST_LARGE:
        height = source.box.y + 4 * _TEXT + 4
        drawing.text("any replica to any", x=middle, y=source.box.y + 3 * _TEXT + 6, size=11, anchor="middle")
        drawing.arrow((source.box.right, height), (target.box.x, height), width=3)
        return
    for first in source.chips:
        for second in target.chips:
            start, end = first.y + first.height / 2, second.y + second.height / 2
            drawing.arrow((first.right, start), (second.x, end))
