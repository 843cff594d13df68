"""Who owns which page of KV memory. One `PageAllocator` a cp rank; `DpPages` adds promises over cp.

A promise is what admission grants before the pages have numbers: a prompt is admitted only when every cp rank can
hold the most that the prompt may come to hold there, and what is over returns when its chunks have settled.
"""

from collections.abc import Iterable, Sequence

from parallel.handoff import PagePlace
from worker.engine.prefix_cache import PrefixCache


class PageAllocator:
    """The pages 0..num_pages-1 of one cp rank: each is free, has exactly one owner, or is the prefix cache's."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: dict[int, int] = {}
        self._cached: set[int] = set()

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

    def hand_over(self, owner: int, page: int) -> None:
        """`owner` gives a page to the prefix cache; ValueError where it does not belong to `owner`."""
        self._disown(owner, page)
        self._cached.add(page)

    def evict(self, page: int) -> None:
        """Frees a page of the prefix cache."""
        self._cached.remove(page)
        self._free.append(page)

    def give_back(self, owner: int, pages: Iterable[int]) -> None:
        """Frees `pages`; ValueError where one does not belong to `owner`."""
        for page in pages:
            self._disown(owner, page)
            self._free.append(page)

    def check_integrity(self, tables: Iterable[tuple[int, Sequence[int]]], *, cached: Iterable[int] = ()) -> None:
        """Proves that free, owned and cached pages are a partition and that `tables` of (owner, pages) hold all owned.

        Raises AssertionError with the pages at fault: a leak, a page with two owners or one that was lost.
        """
        held: dict[int, int] = {}
        for owner, pages in tables:
            for page in pages:
                assert page not in held, f"page {page} is in the tables of {held[page]:016x} and {owner:016x}"
                held[page] = owner
        assert held == self._owners, f"tables and owners differ at {sorted(held.items() ^ self._owners.items())}"
        assert set(cached) == self._cached, "the cache's pages are not those that were handed over"
        everything = sorted([*self._free, *self._owners, *self._cached])
        assert everything == list(range(self._num_pages)), "free, owned and cached pages are no partition of all pages"

    def _disown(self, owner: int, page: int) -> None:
        if self._owners.get(page) != owner:
            raise ValueError(f"page {page} is not owned by {owner:016x} but by {self._owners.get(page)}")
        del self._owners[page]


class DpPages:
    """The pages of one dp coordinate: an allocator for each cp rank, tables and promises by request."""

    def __init__(self, *, cp: int, num_pages: int) -> None:
        self._allocators = [PageAllocator(num_pages) for _ in range(cp)]
        self._cache = PrefixCache(cp=cp)
        self._tables: dict[int, list[PagePlace]] = {}
        self._shared: dict[int, dict[int, bytes]] = {}  # of a table's pages by index, those that the cache has
        self._promised: dict[int, list[int]] = {}
        self._promised_total = [0] * cp

    @property
    def allocators(self) -> Sequence[PageAllocator]:
        """One for each cp rank."""
        return self._allocators

    @property
    def num_free(self) -> int:
        """Pages over all cp ranks that are neither owned nor promised; those that the cache would give up count."""
        return sum(self.available())

    def available(self) -> list[int]:
        """For each cp rank, the pages that may still be promised."""
        parts = zip(self._allocators, self._cache.num_idle(), self._promised_total, strict=True)
        return [allocator.num_free + idle - promised for allocator, idle, promised in parts]

    def load(self) -> list[int]:
        """For each cp rank, the pages that are owned or promised."""
        return [a.num_pages - free for a, free in zip(self._allocators, self.available(), strict=True)]

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """How many pages of a prefix, from its first on, the cache has."""
        return len(self._cache.match(digests))

    def fits(self, pages: int, *, cached: Sequence[bytes] = ()) -> bool:
        """Whether every cp rank can promise `pages` now, beside the pages `cached` that the cache has."""
        taken = self._cache.idle_among(cached)
        return min(free - used for free, used in zip(self.available(), taken, strict=True)) >= pages

    def promise(self, request_id: int, pages: int, *, cached: Sequence[bytes] = ()) -> None:
        """Sets `pages` on every cp rank aside for `request_id`, whose table begins with the cache's `cached`."""
        if not self.fits(pages, cached=cached):
            raise ValueError(f"cannot promise {pages} pages a cp rank: {self.available()} are available")
        self._promised[request_id] = [pages] * len(self._allocators)
        self._promised_total = [total + pages for total in self._promised_total]
        self._tables[request_id] = [self._cache.acquire(digest) for digest in cached]
        self._shared[request_id] = dict(enumerate(cached))

    def publish(self, request_id: int, digests: Sequence[bytes], *, first: int) -> None:
        """The request's pages from `first` on are full and have the keys `digests`: others may read them."""
        table, shared = self._tables[request_id], self._shared[request_id]
        for index, digest in enumerate(digests, first):
            place = table[index]
            if index not in shared and self._cache.publish(digest, place):
                self._allocators[place.coordinate].hand_over(request_id, place.page)
                shared[index] = digest

    def withdraw(self, request_id: int) -> None:
        """Nobody finds the pages of the request's table any more, whoever computed them: one that was found may be what
        is wrong. Those that read them go on reading.
        """
        self._cache.withdraw(self._shared[request_id].values())

    def take(self, request_id: int, *, cp_rank: int) -> PagePlace:
        """A page on `cp_rank`, out of what was promised, appended to the request's table."""
        promised = self._promised[request_id]
        if promised[cp_rank] < 1:
            raise ValueError(f"{request_id:016x} has used all pages promised to it on cp rank {cp_rank}")
        promised[cp_rank] -= 1
        self._promised_total[cp_rank] -= 1
        place = self._take(request_id, cp_rank=cp_rank)
        self._tables[request_id].append(place)
        return place

    def _take(self, request_id: int, *, cp_rank: int) -> PagePlace:
        allocator = self._allocators[cp_rank]
        if not allocator.num_free and self._cache.num_idle()[cp_rank]:
            allocator.evict(self._cache.evict(cp_rank))
        return PagePlace(coordinate=cp_rank, page=allocator.take(request_id))

    def can_spread(self, pages: int, *, most: int) -> bool:
        """Whether `spread` would find `pages` pages now."""
        return sum(min(free, most) for free in self.available() if free > 0) >= pages

    def spread(self, request_id: int, pages: int, *, most: int) -> Sequence[PagePlace]:
        """Takes `pages` pages at once, each where most room is, at most `most` on one cp rank; ValueError where
        there are not so many.
        """
        if not self.can_spread(pages, most=most):
            raise ValueError(f"cannot spread {pages} pages, {most} a cp rank: {self.available()} are available")
        self._promised[request_id] = [0] * len(self._allocators)
        table = self._tables[request_id] = []
        self._shared[request_id] = {}
        counts, free = [0] * len(self._allocators), self.available()
        for _ in range(pages):
            # The emptiest of this sequence first: then its context is read evenly, and stays within `most`.
            open_to = [index for index, room in enumerate(free) if room > 0 and counts[index] < most]
            index = min(open_to, key=lambda index: (counts[index] - free[index], index))
            counts[index] += 1
            free[index] -= 1
            table.append(self._take(request_id, cp_rank=index))
        return table

    def settle(self, request_id: int) -> None:
        """The request will begin no further page: what was promised and not taken returns."""
        left = self._promised.pop(request_id, [0] * len(self._allocators))
        self._promised_total = [total - pages for total, pages in zip(self._promised_total, left, strict=True)]

    def table(self, request_id: int) -> Sequence[PagePlace]:
        """The request's pages in order of position."""
        return self._tables[request_id]

    def release(self, request_id: int) -> None:
        """Gives all pages and promises of the request up: its own are free, the cache's have one reader less."""
        self.settle(request_id)
        shared = self._shared.pop(request_id)
        for index, place in enumerate(self._tables.pop(request_id)):
            if index not in shared:
                self._allocators[place.coordinate].give_back(request_id, [place.page])
        for place in self._cache.release([shared[index] for index in sorted(shared)]):
            self._allocators[place.coordinate].evict(place.page)

    def check_integrity(self) -> None:
        """AssertionError unless every page is free, in exactly one table or the cache's, and promises are covered."""
        for cp_rank, (allocator, cached) in enumerate(zip(self._allocators, self._cache.pages(), strict=True)):
            allocator.check_integrity(
                ((request_id, self._own_pages(request_id, cp_rank=cp_rank)) for request_id in self._tables),
                cached=cached,
            )
        self._cache.check_integrity(digest for shared in self._shared.values() for digest in shared.values())
        sums = [sum(column) for column in zip(*self._promised.values(), strict=True)] or [0] * len(self._allocators)
        assert sums == self._promised_total, f"promises add up to {sums}, not {self._promised_total}"
        assert min(self.available()) >= 0, f"more pages are promised than free: {self.available()}"

    def _own_pages(self, request_id: int, *, cp_rank: int) -> list[int]:
        shared = self._shared[request_id]
        return [
            place.page
            for index, place in enumerate(self._tables[request_id])
            if place.coordinate == cp_rank and index not in shared
        ]
