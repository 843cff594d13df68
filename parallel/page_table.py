"""A sequence's pages in order of position, and the same pages by the coordinate that owns them."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from parallel.handoff import PagePlace


class PageTable:
    """Grows at its end. A coordinate's pages stay sorted by position, so what it holds before a page is a prefix."""

    def __init__(self, *, cp: int, places: Iterable[PagePlace] = ()) -> None:
        self.places: list[PagePlace] = []
        self._pages: list[list[int]] = [[] for _ in range(cp)]
        self._indices: list[list[int]] = [[] for _ in range(cp)]
        for place in places:
            self.append(place)

    def __len__(self) -> int:
        return len(self.places)

    def append(self, place: PagePlace) -> None:
        """Adds the sequence's next page."""
        self._pages[place.coordinate].append(place.page)
        self._indices[place.coordinate].append(len(self.places))
        self.places.append(place)

    def count_of(self, coordinate: int, *, before: int) -> int:
        """How many of the first `before` pages of the table `coordinate` owns."""
        return bisect_left(self._indices[coordinate], before)

    def pages_of(self, coordinate: int, *, before: int) -> Sequence[int]:
        """The numbers of the pages that `coordinate` owns among the first `before` of the table, in order."""
        return self._pages[coordinate][: self.count_of(coordinate, before=before)]
