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

    def __post_init__(self) -> None:
        planes = {plane.name: plane for plane in self.planes}
        for what, view in (("key", self.key), ("value", self.value)):
            if view.plane not in planes:
                raise ValueError(
                    f"the {what} of group {self.name} lies in plane {view.plane!r}, which it does not have"
                )
            end, elements = view.offset + view.width, planes[view.plane].elements
            if view.offset < 0 or view.width < 1 or end > elements:
                raise ValueError(
                    f"the {what} of group {self.name} are the elements [{view.offset}, {end}) of plane {view.plane}, "
                    f"which has {elements}"
                )
        if {planes[view.plane].dtype for view in (self.key, self.value)} != {planes[self.key.plane].dtype}:
            raise ValueError(f"the key and the value of group {self.name} have two dtypes: no kernel takes that yet")
        if self.key.plane == self.value.plane and self._is_all_value:
            raise ValueError(
                f"the value of group {self.name} is its whole key: nothing would be left to tell that a row is broken"
            )

    @property
    def _is_all_value(self) -> bool:
        """Whether no element of the key is the key's alone."""
        key, value = self.key, self.value
        return value.offset <= key.offset and key.offset + key.width <= value.offset + value.width

    @property
    def window(self) -> int:
        """Positions that a query sees; 0 where there is no such bound."""
        return self.sees.tokens if isinstance(self.sees, Window) else 0

    def first_seen(self, position: int) -> int:
        """The first position that a query at `position` sees, or what comes after it."""
        return max(position - self.window + 1, 0) if self.window else 0

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


def check_alike(own: RankStorage, other: RankStorage) -> None:
    """ValueError naming the plane and both values where two ranks store something else; pages, heads and strides may
    differ: copies know them.
    """
    names = [", ".join(group.name for group in storage.groups) for storage in (own, other)]
    if names[0] != names[1]:
        raise ValueError(f"there are the cache groups {names[0]} here and {names[1] or 'none'} there")
    for here, there in zip(own.groups, other.groups, strict=True):
        if there.page.page_size < 1:
            raise ValueError(f"group {there.name} has pages of {there.page.page_size} tokens there")
        _check_planes(here, there)


def check_holds(region: GroupRegion, *, layers: Sequence[int], heads: tuple[int, int] | None) -> None:
    """ValueError where `region` has not all of `layers`, and of what is stored per head all of `heads`."""
    missing = sorted(set(layers) - set(region.layers))
    if missing:
        raise ValueError(f"group {region.name} has no layer {missing[0]} there")
    for plane in region.page.planes:
        end = region.first_head + plane.num_heads
        if heads is not None and plane.per_head and not region.first_head <= heads[0] < heads[1] <= end:
            raise ValueError(
                f"plane {plane.name} of group {region.name} has the heads {region.first_head} to {end - 1} there, not "
                f"{heads[0]} to {heads[1] - 1}"
            )


def _check_planes(own: GroupRegion, other: GroupRegion) -> None:
    names = [", ".join(plane.name for plane in group.page.planes) for group in (own, other)]
    if names[0] != names[1]:
        raise ValueError(f"group {own.name} has the planes {names[0]} here and {names[1]} there")
    for here, there in zip(own.page.planes, other.page.planes, strict=True):
        for what in ("dtype", "elements", "per_head"):
            if getattr(here, what) != getattr(there, what):
                raise ValueError(
                    f"plane {here.name} of group {own.name} has {what} {getattr(here, what)} here and "
                    f"{getattr(there, what)} there: both pools must store alike"
                )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
