"""How a drawn topology looks: two scales, for few ranks and for many, and its colours."""

from dataclasses import dataclass

#: Fill of a pool's devices, and the darker tone of its frames.
POOL_COLORS = {"prefill": ("#dbeafe", "#1d4ed8"), "decode": ("#ffedd5", "#c2410c"), "unified": ("#dcfce7", "#15803d")}
FREE_COLORS = ("#fafafa", "#bbbbbb")
#: A group's colour: neighbours differ, and after these they come again.
GROUP_COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#ee8866",
    "#44bb99",
    "#999933",
    "#882255",
    "#77aadd",
    "#997700",
)
#: Axes in the order of their strips, from the top of a device. Those inside a block of experts are its own.
STRIPS = ("pp", "attn_dp", "attn_cp", "attn_tp", "moe_dp", "block")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes in pixels. Where `is_small`, a strip has its colour only and a device its rank's number only."""

    is_small: bool
    cell_width: float
    rank_text: float
    strip_height: float
    label_text: float
    gap: float


LARGE = Scale(is_small=False, cell_width=112, rank_text=13, strip_height=16, label_text=12, gap=8)
SMALL = Scale(is_small=True, cell_width=25, rank_text=9.5, strip_height=5, label_text=9, gap=4)
#: More ranks than these are drawn small.
MOST_LARGE_RANKS = 40
#: Hosts with more devices than these are not drawn, but counted.
MOST_DEVICES = 1024
#: Round the strip of a group that crosses hosts although bytes move along it in every layer.
CROSSING_COLOR = "#000000"
#: The axes along which they do.
LAYER_AXES = ("attn_cp", "attn_tp", "block")
MARGIN = 24.0


def group_color(index: int) -> str:
    """The colour of the group that is at `index` among those of its axis and pool."""
    return GROUP_COLORS[index % len(GROUP_COLORS)]


def text_color(fill: str) -> str:
    """Black or white, whichever is read more easily on `fill`."""
    red, green, blue = (int(fill[start : start + 2], 16) for start in (1, 3, 5))
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def counted(number: int, noun: str) -> str:
    """`1 host`, `2 hosts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
