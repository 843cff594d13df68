"""Who owns which page of KV memory. One `PageAllocator` a coordinate; `CoordinatePages` adds promises over cp.

A promise is what admission grants before the pages have numbers: a prompt is admitted only when every coordinate can
hold the most that the prompt may come to hold there, and what is over returns when its chunks have settled.
"""

from collections.abc import Iterable, Sequence

from parallel.handoff import PagePlace


class PageAllocator:
    """The pages 0..num_pages-1 of one coordinate: each is free or has exactly one owner."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: dict[int, int] = {}

    @property
    def num_pages(self) -> int:
        """All pages, free or not."""
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def take(self, owner: int) -> int:
        """Gives `owner` a page and returns its number; ValueError where none is free."""
        if not self._free:
            raise ValueError(f"no page is free for {owner:016x}: all {self._num_pages} have owners")
        page = self._free.pop()
        self._owners[page] = owner
        return page

    def give_back(self, owner: int, pages: Iterable[int]) -> None:
        """Frees `pages`; ValueError where one does not belong to `owner`."""
        for page in pages:
            if self._owners.get(page) != owner:
                raise ValueError(f"page {page} is not owned by {owner:016x} but by {self._owners.get(page)}")
            del self._owners[page]
            self._free.append(page)

    def check_integrity(self, tables: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Proves that free and owned pages are a partition and that `tables` of (owner, pages) hold all owned ones.

        Raises AssertionError with the pages at fault: a leak, a page with two owners or one that was lost.
        """
        held: dict[int, int] = {}
        for owner, pages in tables:
            for page in pages:
                assert page not in held, f"page {page} is in the tables of {held[page]:016x} and {owner:016x}"
                held[page] = owner
        assert held == self._owners, f"tables and owners differ at {sorted(held.items() ^ self._owners.items())}"
        everything = sorted([*self._free, *self._owners])
        assert everything == list(range(self._num_pages)), "free and owned pages are not a partition of all pages"


class CoordinatePages:
    """The pages of one dp coordinate: an allocator for each cp coordinate, tables and promises by request."""

    def __init__(self, *, cp: int, num_pages: int) -> None:
        self._allocators = [PageAllocator(num_pages) for _ in range(cp)]
        self._tables: dict[int, list[PagePlace]] = {}
        self._promised: dict[int, list[int]] = {}
        self._promised_total = [0] * cp

    @property
    def num_free(self) -> int:
        """Pages over all coordinates that are neither owned nor promised."""
        return sum(self.available())

    def available(self) -> list[int]:
        """For each coordinate, the pages that may still be promised."""
        pairs = zip(self._allocators, self._promised_total, strict=True)
        return [allocator.num_free - promised for allocator, promised in pairs]

    def load(self) -> list[int]:
        """For each coordinate, the pages that are owned or promised."""
        return [a.num_pages - free for a, free in zip(self._allocators, self.available(), strict=True)]

    def fits(self, pages: int) -> bool:
        """Whether every coordinate can promise `pages` now."""
        return min(self.available()) >= pages

    def promise(self, request_id: int, pages: int) -> None:
        """Sets `pages` on every coordinate aside for `request_id`."""
        if not self.fits(pages):
            raise ValueError(f"cannot promise {pages} pages a coordinate: {self.available()} are available")
        self._promised[request_id] = [pages] * len(self._allocators)
        self._promised_total = [total + pages for total in self._promised_total]
        self._tables[request_id] = []

    def take(self, request_id: int, coordinate: int) -> PagePlace:
        """A page on `coordinate`, out of what was promised, appended to the request's table."""
        promised = self._promised[request_id]
        if promised[coordinate] < 1:
            raise ValueError(f"{request_id:016x} has used all pages promised to it on coordinate {coordinate}")
        promised[coordinate] -= 1
        self._promised_total[coordinate] -= 1
        place = PagePlace(coordinate=coordinate, page=self._allocators[coordinate].take(request_id))
        self._tables[request_id].append(place)
        return place

    def can_spread(self, pages: int, *, most: int) -> bool:
        """Whether `spread` would find `pages` pages now."""
        return sum(min(free, most) for free in self.available() if free > 0) >= pages

    def spread(self, request_id: int, pages: int, *, most: int) -> Sequence[PagePlace]:
        """Takes `pages` pages at once, each where most room is, at most `most` on one coordinate; ValueError where
        there are not so many.
        """
        if not self.can_spread(pages, most=most):
            raise ValueError(f"cannot spread {pages} pages, {most} a coordinate: {self.available()} are available")
        self._promised[request_id] = [0] * len(self._allocators)
        table = self._tables[request_id] = []
        counts, free = [0] * len(self._allocators), self.available()
        for _ in range(pages):
            # The emptiest of this sequence first: then its context is read evenly, and stays within `most`.
            open_to = [index for index, room in enumerate(free) if room > 0 and counts[index] < most]
            index = min(open_to, key=lambda index: (counts[index] - free[index], index))
            counts[index] += 1
            free[index] -= 1
            table.append(PagePlace(coordinate=index, page=self._allocators[index].take(request_id)))
        return table

    def settle(self, request_id: int) -> None:
        """The request will begin no further page: what was promised and not taken returns."""
        left = self._promised.pop(request_id, [0] * len(self._allocators))
        self._promised_total = [total - pages for total, pages in zip(self._promised_total, left, strict=True)]

    def table(self, request_id: int) -> Sequence[PagePlace]:
        """The request's pages in order of position."""
        return self._tables[request_id]

    def release(self, request_id: int) -> None:
        """Frees all pages and promises of the request."""
        self.settle(request_id)
        for place in self._tables.pop(request_id):
            self._allocators[place.coordinate].give_back(request_id, [place.page])

    def check_integrity(self) -> None:
        """AssertionError unless every page is free or in exactly one table, and promises are covered."""
        for coordinate, allocator in enumerate(self._allocators):
            allocator.check_integrity(
                (request_id, [place.page for place in table if place.coordinate == coordinate])
                for request_id, table in self._tables.items()
            )
        sums = [sum(column) for column in zip(*self._promised.values(), strict=True)] or [0] * len(self._allocators)
        assert sums == self._promised_total, f"promises add up to {sums}, not {self._promised_total}"
        assert min(self.available()) >= 0, f"more pages are promised than free: {self.available()}"
