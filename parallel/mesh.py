"""A mesh: named axes over consecutive ranks, row-major, the last axis contiguous. The only place of rank arithmetic."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt, prod
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """An exact factorisation of `size` ranks: rank = (…(c0 · n1 + c1) · n2 + c2…), c the coordinates in axis order."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"a mesh names each axis once, but got {', '.join(names)}")
        for name, size in self.axes:
            if size < 1:
                raise ValueError(f"axis {name} has size {size}: a size is 1 or more")

    @cached_property
    def size(self) -> int:
        """Number of ranks."""
        return prod(size for _, size in self.axes)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of each axis by name."""
        return MappingProxyType(dict(self.axes))

    def coordinates(self, rank: int) -> Mapping[str, int]:
        """The coordinate of `rank` on each axis, by name."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.size} ranks")
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return MappingProxyType(found)

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at `coordinates`, which name every axis: the inverse of `coordinates`."""
        rank = 0
        for name, size in self.axes:
            coordinate = coordinates[name]
            if not 0 <= coordinate < size:
                raise ValueError(f"{name} coordinate {coordinate} is outside 0..{size - 1}")
            rank = rank * size + coordinate
        return rank

    def groups(self, *names: str) -> Iterator[tuple[int, ...]]:
        """The sets of ranks that differ in the axes `names` only, ascending, ordered by their first rank."""
        for name in names:
            if name not in self.sizes:
                raise ValueError(f"no axis {name} in a mesh of {', '.join(self.sizes)}")
        offsets = self._offsets(names)
        for first in self._offsets([name for name in self.sizes if name not in names]):
            yield tuple(first + offset for offset in offsets)

    def group_of(self, rank: int, *names: str) -> tuple[int, ...]:
        """The ranks, `rank` among them, that differ from it in the axes `names` only, ascending."""
        coordinates = self.coordinates(rank)
        first = self.rank({**coordinates, **dict.fromkeys(names, 0)})
        return tuple(first + offset for offset in self._offsets(names))

    def _offsets(self, names: Collection[str]) -> list[int]:
        """The ranks whose coordinate is 0 on every axis but `names`, ascending."""
        offsets = [0]
        for name, size in self.axes:
            count = size if name in names else 1
            offsets = [offset * size + index for offset in offsets for index in range(count)]
        return offsets


def divisors(number: int) -> tuple[int, ...]:
    """Every divisor of `number`, ascending; `number` is 1 or more."""
    # Searched up to the root only: a mistyped size may be a large number, and its message is made of this.
    low = [candidate for candidate in range(1, isqrt(number) + 1) if number % candidate == 0]
    return tuple(sorted({*low, *(number // candidate for candidate in low)}))
