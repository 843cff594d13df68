"""What layers store, as data, and where each byte of it lies: the one room that knows an index into KV memory.

```
page of a group    | plane k: head 0, head 1, ... | plane v: head 0, head 1, ... | padding |     page_bytes
head of a plane    | position 0 | position 1 | ... | position page_size - 1 |                   head_stride
position           | element 0 .. elements - 1 |                                                 position_stride
region of a rank   | group 0: layer, layer, ... each num_pages pages | group 1: ... |
```
Everything else takes offsets and strides from here: allocation, bytes in reports, exchange, hand-off, the kernels'
views. Pure, no torch. All offsets and strides are bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNITS = ("token",)
#: A page begins at a multiple of so many bytes, as kernels load.
_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One tensor that a layer stores: `elements` for each `unit`, of every KV head where `per_head`, else once.

    What is shared over heads is stored by every tp rank. `dtype` is empty for the engine's own.
    """

    name: str
    elements: int
    per_head: bool
    dtype: str = ""
    unit: str = "token"

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"plane {self.name} is stored per {self.unit!r}: only per {_UNITS[0]!r} is stored yet")
        if self.dtype and self.dtype not in DTYPE_BYTES:
            raise ValueError(f"plane {self.name} has dtype {self.dtype!r}: those that run are {', '.join(DTYPE_BYTES)}")


@dataclass(frozen=True, kw_only=True)
class PlaneView:
    """`width` elements of a plane, from `offset` on: a layer's key, or its value, which may lie inside the key's."""

    plane: str
    offset: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Everything:
    """A query sees all positions up to its own."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A query sees the last `tokens` positions, its own included."""

    tokens: int


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A query sees a list of `tokens` positions, which is made on the device."""

    tokens: int


Sight = Everything | Window | Listed
EVERYTHING = Everything()


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that store alike and see alike; each group has its own page table, free list and promises.

    `num_kv_heads` are the model's; `key` and `value` say where attention finds its two operands.
    """

    name: str
    layers: tuple[int, ...]
    sees: Sight
    num_kv_heads: int
    planes: tuple[Plane, ...]
    key: PlaneView
    value: PlaneView

    @property
    def window(self) -> int:
        """Positions that a query sees; 0 where there is no such bound."""
        return self.sees.tokens if isinstance(self.sees, Window) else 0

    def elements(self, *, num_heads: int) -> int:
        """Elements that one token takes in one layer on a rank with `num_heads` KV heads."""
        return sum(plane.elements * (num_heads if plane.per_head else 1) for plane in self.planes)

    def token_bytes(self, *, num_heads: int, dtype: str) -> int:
        """Bytes that one token takes in one layer on a rank with `num_heads` KV heads."""
        return sum(
            plane.elements * DTYPE_BYTES[plane.dtype or dtype] * (num_heads if plane.per_head else 1)
            for plane in self.planes
        )


def keys_and_values(name: str, *, layers: Sequence[int], sees: Sight, num_kv_heads: int, head_size: int) -> CacheGroup:
    """The group of grouped-query attention: one K and one V of `head_size` for each KV head."""
    return CacheGroup(
        name=name,
        layers=tuple(layers),
        sees=sees,
        num_kv_heads=num_kv_heads,
        planes=tuple(Plane(name=plane, elements=head_size, per_head=True) for plane in ("k", "v")),
        key=PlaneView(plane="k", offset=0, width=head_size),
        value=PlaneView(plane="v", offset=0, width=head_size),
    )


@dataclass(frozen=True, kw_only=True)
class PlaneLayout:
    """Where a plane lies in a page of one rank: element e of position p of head h begins at
    offset + h * head_stride + p * position_stride + e * itemsize.
    """

    name: str
    dtype: str
    elements: int
    per_head: bool
    num_heads: int
    offset: int
    head_stride: int
    position_stride: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def run_bytes(self) -> int:
        """Bytes of one position of one head, which are contiguous."""
        return self.elements * self.itemsize


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """A page of `page_size` positions: its planes, and the bytes to the next page."""

    page_size: int
    page_bytes: int
    planes: tuple[PlaneLayout, ...]

    def plane(self, name: str) -> PlaneLayout:
        """The plane `name`."""
        return next(plane for plane in self.planes if plane.name == name)


def lay_out_page(planes: Sequence[Plane], *, page_size: int, num_heads: int, dtype: str) -> PageLayout:
    """A page of `planes` on a rank with `num_heads` KV heads: head-major, so that a head's positions are one run."""
    laid_out, offset = [], 0
    for plane in planes:
        itemsize = DTYPE_BYTES[plane.dtype or dtype]
        position_stride = plane.elements * itemsize
        heads = num_heads if plane.per_head else 1
        laid_out.append(
            PlaneLayout(
                name=plane.name,
                dtype=plane.dtype or dtype,
                elements=plane.elements,
                per_head=plane.per_head,
                num_heads=heads,
                offset=offset,
                head_stride=page_size * position_stride,
                position_stride=position_stride,
            )
        )
        offset = _aligned(offset + heads * page_size * position_stride)
    return PageLayout(page_size=page_size, page_bytes=offset, planes=tuple(laid_out))


@dataclass(frozen=True, kw_only=True)
class GroupRegion:
    """The memory of one group on a rank: its layers of the stage, one after the other, each of `num_pages` pages.

    `first_head` is the model's number of the rank's first KV head. `first_byte` counts from the region's begin.
    """

    name: str
    page: PageLayout
    layers: tuple[int, ...]
    num_pages: int
    first_head: int
    first_byte: int

    @property
    def layer_bytes(self) -> int:
        """Bytes from one layer's memory to the next."""
        return self.num_pages * self.page.page_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return len(self.layers) * self.layer_bytes

    def layer_start(self, layer: int) -> int:
        """The first byte of the model's layer `layer`."""
        return self.first_byte + self.layers.index(layer) * self.layer_bytes


@dataclass(frozen=True, kw_only=True)
class RankStorage:
    """The KV memory of one rank: one region, group after group."""

    groups: tuple[GroupRegion, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the region."""
        return sum(group.num_bytes for group in self.groups)

    def group(self, name: str) -> GroupRegion:
        """The group `name`."""
        return next(group for group in self.groups if group.name == name)


def lay_out_storage(
    groups: Sequence[CacheGroup],
    *,
    layers: range,
    heads: Mapping[str, tuple[int, int]],
    num_pages: Mapping[str, int],
    page_size: int,
    dtype: str,
) -> RankStorage:
    """The storage of a rank that holds `layers` and, by group, the KV heads [first, first + count) of `heads`."""
    regions: list[GroupRegion] = []
    for group in groups:
        first_head, count = heads[group.name]
        region = GroupRegion(
            name=group.name,
            page=lay_out_page(group.planes, page_size=page_size, num_heads=count, dtype=dtype),
            layers=tuple(layer for layer in group.layers if layer in layers),
            num_pages=num_pages[group.name],
            first_head=first_head,
            first_byte=sum(region.num_bytes for region in regions),
        )
        regions.append(region)
    return RankStorage(groups=tuple(regions))


def check_alike(own: GroupRegion, other: GroupRegion) -> None:
    """ValueError naming the plane and both values where the two store something else; pages, heads and strides may
    differ: copies know them.
    """
    names = [plane.name for plane in own.page.planes], [plane.name for plane in other.page.planes]
    if names[0] != names[1]:
        raise ValueError(f"group {own.name} has the planes {', '.join(names[0])} here and {', '.join(names[1])} there")
    for here, there in zip(own.page.planes, other.page.planes, strict=True):
        for what in ("dtype", "elements", "per_head"):
            if getattr(here, what) != getattr(there, what):
                raise ValueError(
                    f"plane {here.name} of group {own.name} has {what} {getattr(here, what)} here and "
                    f"{getattr(there, what)} there: both pools must store alike"
                )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
