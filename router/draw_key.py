"""Draws the key: what colours of devices, frames and strips stand for."""

from router.draw_hosts import HostPainter
from router.draw_style import CROSSING_COLOR, FREE_COLORS, POOL_COLORS, group_color
from router.svg import LETTER, Box, Drawing

_TEXT = 12.0
_LINE = _TEXT + 7
_GAP = 24.0
_MEANINGS = {
    "pp": "the stages of a pipeline",
    "attn_dp": "each has sequences of its own",
    "attn_cp": "they share the tokens of a sequence",
    "attn_tp": "they share the attention heads",
    "moe_dp": "each holds the same experts",
    "block": "they share the experts (ep x moe_tp)",
}
#: The index of a colour, what is round it, and what two strips of it mean.
_SAMPLES = (
    (0, "none", "one group"),
    (1, "none", "another in the same strip of the same replica"),
    (2, CROSSING_COLOR, "a group across hosts, with bytes to move in every layer"),
)


def paint_key(drawing: Drawing, painter: HostPainter, *, x: float, y: float) -> Box:
    """Draws the key from x, y and returns what it covers."""
    right = _paint_devices(drawing, painter, x=x, y=y)
    bottom = y + _LINE
    if painter.axes:
        right = max(right, _paint_samples(drawing, x=x, y=bottom + 6))
        bottom = _paint_strips(drawing, painter, x=x, y=bottom + 6 + _LINE)
    return Box(x=x, y=y, width=right - x, height=bottom - y)


def _paint_devices(drawing: Drawing, painter: HostPainter, *, x: float, y: float) -> float:
    """One line of the colours of pools and of what is free; returns where it ends."""
    pools = dict.fromkeys(replica.pool for replica in painter.topology.replicas)
    for words, (fill, stroke) in [*((name, POOL_COLORS[name]) for name in pools), ("free device", FREE_COLORS)]:
        drawing.rect(Box(x=x, y=y, width=22, height=_TEXT + 2), fill=fill, stroke=stroke, radius=3)
        drawing.text(words, x=x + 28, y=y + _TEXT, size=_TEXT)
        x += 28 + len(words) * _TEXT * LETTER + _GAP
    return x


def _paint_samples(drawing: Drawing, *, x: float, y: float) -> float:
    for index, stroke, words in _SAMPLES:
        for left in (x, x + 24):
            box = Box(x=left, y=y + 3, width=22, height=_TEXT - 2)
            drawing.rect(box, fill=group_color(index), stroke=stroke)
        drawing.text(words, x=x + 52, y=y + _TEXT, size=_TEXT)
        x += 52 + len(words) * _TEXT * LETTER + _GAP
    return x


def _paint_strips(drawing: Drawing, painter: HostPainter, *, x: float, y: float) -> float:
    """One line for each strip; returns where they end."""
    drawing.text(
        "strips of a device, from the top; what the ranks of one group are to each other:", x=x, y=y + _TEXT, size=_TEXT
    )
    for index, axis in enumerate(painter.axes, 1):
        drawing.text(f"{index}. {axis}: {_MEANINGS[axis]}", x=x + 12, y=y + index * _LINE + _TEXT, size=_TEXT)
    return y + (len(painter.axes) + 1) * _LINE
