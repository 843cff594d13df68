"""The pages of one cache group in one dp coordinate: an allocator for each cp rank, tables and promises by request.

A promise is what admission grants before the pages have numbers; what of it is open is set aside on each cp rank:

```
sees everything   share = what it found, and the bound of new pages      open = share - held
a window          share = the window's pages, on every cp rank           open = share - held, and what it has borrowed
```
Behind a window pages return while the sequence runs, so its share opens again. A chunk may take more than the share
from what nobody was promised. A page of the prefix cache that several read is held by all, and counts for the first
alone: the others have borrowed it. When the first lets go it counts for the next, so that much is set aside for them.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from parallel.arrays import Ints
from parallel.chunk import admission_bound
from parallel.page_columns import packed
from parallel.settings import EngineSettings
from parallel.storage import CacheGroup
from proto import control_pb2
from worker.engine.holding import Column, Holding, empty_holding
from worker.engine.page_allocator import PageAllocator
from worker.engine.page_spread import can_spread, spread
from worker.engine.prefix_cache import CachedPage, PrefixCache


class GroupPages:
    """Pages of requests, which a request has from `promise` or `reserve` until `release`."""

    def __init__(self, group: CacheGroup, *, cp: int, pp: int, settings: EngineSettings) -> None:
        self._group = group
        self.window = group.window
        self.num_pages = settings.pages_of(group, pp=pp)
        self._window_pages = settings.window_pages(group)
        self._page_size = settings.page_size
        self._cp = cp
        self._allocators = [PageAllocator(self.num_pages) for _ in range(cp)]
        self._cache = PrefixCache(cp=cp)
        self._holdings: dict[int, Holding] = {}
        self._promised = [0] * cp

    # ---- what there is ----

    @property
    def allocators(self) -> Sequence[PageAllocator]:
        """One for each cp rank."""
        return self._allocators

    def available(self) -> list[int]:
        """For each cp rank, the pages that may still be promised; those that the cache would give up count."""
        return [
            allocator.num_free + self._cache.num_idle(cp_rank) - promised
            for cp_rank, (allocator, promised) in enumerate(zip(self._allocators, self._promised, strict=True))
        ]

    def load(self) -> list[int]:
        """For each cp rank, the pages that are owned or promised."""
        return [self.num_pages - free for free in self.available()]

    def first_seen(self, end: int) -> int:
        """The place in a table of the first page that a query at position `end` sees, or what comes after it."""
        return self._group.first_seen(end) // self._page_size

    def holding(self, request_id: int) -> Holding:
        """What a request has. To be read only."""
        return self._holdings[request_id]

    def columns(self, request_id: int) -> control_pb2.Pages:
        """The request's table, as the wire has it."""
        holding = self._holdings[request_id]
        return control_pb2.Pages(
            first_page=holding.first_page, cp_ranks=packed(holding.cp_ranks), pages=packed(holding.pages)
        )

    # ---- the prefix cache ----

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """How many pages of a prefix, from its first on, the cache has."""
        return self._cache.num_first(digests)

    @property
    def pages_behind(self) -> int:
        """How many pages a query sees, at most, that comes after whole pages: where there is a window."""
        return -(-(self.window - 1) // self._page_size)

    def has_cached(self, digest: bytes) -> bool:
        """Whether the cache has the page of that key."""
        return self._cache.has(digest)

    def publish(self, request_id: int, digests: Sequence[bytes], *, first: int) -> None:
        """The request's pages from the place `first` on are full and have the keys `digests`: others may read them."""
        holding = self._holdings[request_id]
        start = holding.first_page
        for place, digest in enumerate(digests[max(start - first, 0) :], max(first, start)):
            page = CachedPage(holding.cp_ranks[place - start], holding.pages[place - start])
            if place not in holding.shared and self._cache.publish(digest, page, reader=request_id):
                self._allocators[page.cp_rank].hand_over(request_id, page.page)
                holding.shared[place] = digest

    def withdraw(self, digests: Sequence[bytes]) -> None:
        """Nobody finds pages of these keys any more, whoever computed them: one that was found may be what is wrong,
        and so may one that lies behind the window by now. Those that read them go on reading.
        """
        for place in self._cache.withdraw(digests):
            self._allocators[place.cp_rank].evict(place.page)

    # ---- promises ----

    def fits(self, num_pages: int, *, cached: Sequence[bytes] = ()) -> bool:
        """Whether a sequence of `num_pages` pages may come in now, of which the cache has the first `cached`."""
        seen = cached[self._first_cached(cached) :]
        share = self._share(num_pages, cached)
        taken = self._cache.idle_among(seen)
        if self.window:  # what it finds is a part of the share
            return min(self.available()) >= share
        return min(free - used for free, used in zip(self.available(), taken, strict=True)) >= share

    def promise(self, request_id: int, num_pages: int, *, cached: Sequence[bytes] = ()) -> None:
        """Lets a sequence of `num_pages` pages in, whose table begins with the cache's."""
        share = self._share(num_pages, cached)
        if not self.fits(num_pages, cached=cached):
            raise ValueError(f"cannot promise {share} pages a cp rank: {self.available()} are available")
        first = self._first_cached(cached)
        holding = self._enter(request_id, first_page=first)
        for place, digest in enumerate(cached[first:], first):
            page, is_borrowed = self._cache.acquire(digest, reader=request_id)
            holding.cp_ranks.append(page.cp_rank)
            holding.pages.append(page.page)
            holding.shared[place] = digest
            holding.held[page.cp_rank] += 1
            if is_borrowed and self.window:
                self._borrow(holding, page.cp_rank, 1)
        # What sees everything keeps what it found: its share counts new pages.
        found = [0] * self._cp if self.window else holding.held
        self._set_share(holding, [share + pages for pages in found])

    def can_reserve(self, *, prompt_tokens: int, num_pages: int, home: int) -> bool:
        """Whether `reserve` would find its pages now."""
        available = self.available()
        if self.window:
            return available[home] >= self._share_of_reserved(prompt_tokens, num_pages)
        most = admission_bound(pages=num_pages, cp=self._cp)
        return can_spread(num_pages, available=available, most=most)

    def reserve(self, request_id: int, *, prompt_tokens: int, num_pages: int, home: int) -> None:
        """Takes the pages of a sequence whose KV is on its way: all `num_pages`, each where most room is; or, of a
        window, those that a query behind the prompt sees, on its home. ValueError where there are not so many.
        """
        if not self.can_reserve(prompt_tokens=prompt_tokens, num_pages=num_pages, home=home):
            raise ValueError(f"cannot reserve {num_pages} pages: {self.available()} are available")
        if self.window:
            first = self.first_seen(prompt_tokens)
            share = [0] * self._cp
            share[home] = self._share_of_reserved(prompt_tokens, num_pages)
            owners = np.full(-(-prompt_tokens // self._page_size) - first, home)
        else:
            first = 0
            most = admission_bound(pages=num_pages, cp=self._cp)
            owners = spread(num_pages, available=self.available(), most=most)
            share = np.bincount(owners, minlength=self._cp).tolist()
        self._set_share(self._enter(request_id, first_page=first), share)
        self.begin(request_id, owners)

    def settle(self, request_id: int, *, home: int | None = None) -> None:
        """The request will begin no further page, or only on its home: what is promised beyond returns."""
        holding = self._holdings[request_id]
        kept = [share if cp_rank == home else 0 for cp_rank, share in enumerate(holding.share)]
        self._set_share(holding, kept)

    # ---- pages ----

    def room(self, request_id: int) -> list[int]:
        """For each cp rank, the pages that the request may begin there now."""
        holding = self._holdings[request_id]
        own = [holding.open_share(cp_rank) for cp_rank in range(self._cp)]
        return [left + free for left, free in zip(own, self.available(), strict=True)] if self.window else own

    def emptiest(self, request_id: int) -> int:
        """The cp rank that has fewest pages of this request, and of those the one that has fewest of all."""
        if self._cp == 1:
            return 0
        begun = self._holdings[request_id].begun
        return min(range(self._cp), key=list(zip(begun, self.load(), strict=True)).__getitem__)

    def begin(self, request_id: int, owners: Ints) -> Column:
        """Adds a page on each of `owners` to the request's table; returns their numbers. ValueError where one is over
        the promise, or over what nobody was promised.
        """
        holding = self._holdings[request_id]
        counts = np.bincount(owners, minlength=self._cp).tolist()
        pages = np.empty(len(owners), dtype=np.int32)
        for cp_rank, count in enumerate(counts):
            if count:
                pages[owners == cp_rank] = self._take(request_id, holding, cp_rank, count)
        holding.cp_ranks.frombytes(owners.astype(np.int32).tobytes())
        begun = array("i", pages.tobytes())
        holding.pages.extend(begun)
        return begun

    def begin_one(self, request_id: int, cp_rank: int) -> int:
        """As `begin`, for one page: what a decoding sequence takes."""
        holding = self._holdings[request_id]
        (page,) = self._take(request_id, holding, cp_rank, 1)
        holding.cp_ranks.append(cp_rank)
        holding.pages.append(page)
        return page

    def release_before(self, request_id: int, place: int) -> bool:
        """Gives up the request's pages before `place`: its own are free, the cache's have one reader less. Returns
        whether more may be promised than before.
        """
        holding = self._holdings[request_id]
        first, count = holding.first_page, min(place - holding.first_page, len(holding.pages))
        if count <= 0:
            return False
        holding.first_page += count
        cp_ranks, pages = holding.cp_ranks[:count], holding.pages[:count]
        del holding.cp_ranks[:count], holding.pages[:count]
        own: list[list[int]] = [[] for _ in range(self._cp)]
        shared: list[bytes] = []
        for index in reversed(range(count)):
            digest = holding.shared.pop(first + index, None)
            if digest is None:
                own[cp_ranks[index]].append(pages[index])
            else:
                shared.append(digest)
        has_freed = bool(shared)
        for cp_rank, mine in enumerate(own):
            has_freed |= holding.held[cp_rank] > holding.share[cp_rank]
            self._hold(holding, cp_rank, -cp_ranks.count(cp_rank))
            self._allocators[cp_rank].give_back(request_id, mine)
        self._let_go(request_id, shared)
        return has_freed

    def release(self, request_id: int) -> None:
        """Gives all pages and promises of the request up."""
        self.settle(request_id)
        holding = self._holdings[request_id]
        self.release_before(request_id, holding.end_page)
        del self._holdings[request_id]

    def check_integrity(self) -> None:
        """AssertionError unless every page is free, in exactly one table or the cache's, and promises are covered."""
        for cp_rank, (allocator, cached) in enumerate(zip(self._allocators, self._cache.pages(), strict=True)):
            own = ((request_id, holding.own_pages(cp_rank)) for request_id, holding in self._holdings.items())
            allocator.check_integrity(own, cached=cached)
        self._cache.check_integrity(
            (request_id, digest) for request_id, holding in self._holdings.items() for digest in holding.shared.values()
        )
        promised = [0] * self._cp
        for request_id, holding in self._holdings.items():
            assert holding.held == [holding.cp_ranks.count(cp_rank) for cp_rank in range(self._cp)]
            assert holding.borrowed == self._count_borrowed(request_id, holding)
            for cp_rank in range(self._cp):
                promised[cp_rank] += holding.open_share(cp_rank) + holding.borrowed[cp_rank]
        assert promised == self._promised, f"promises add up to {promised}, not {self._promised}"
        assert min(self.available()) >= 0, f"more pages are promised than free: {self.available()}"

    # ---- how it counts ----

    def _first_cached(self, cached: Sequence[bytes]) -> int:
        """The place of the first page that a sequence behind the prefix `cached` sees."""
        return self.first_seen(len(cached) * self._page_size)

    def _share(self, num_pages: int, cached: Sequence[bytes]) -> int:
        if self.window:
            return min(self._window_pages, num_pages - self._first_cached(cached))
        return admission_bound(pages=num_pages - len(cached), cp=self._cp)

    def _share_of_reserved(self, prompt_tokens: int, num_pages: int) -> int:
        return min(self._window_pages, num_pages - self.first_seen(prompt_tokens))

    def _enter(self, request_id: int, *, first_page: int) -> Holding:
        holding = self._holdings[request_id] = empty_holding(cp=self._cp, first_page=first_page)
        return holding

    def _take(self, request_id: int, holding: Holding, cp_rank: int, count: int) -> list[int]:
        left = holding.share[cp_rank] - holding.held[cp_rank]
        if count > left and (not self.window or count > self.room(request_id)[cp_rank]):
            raise ValueError(f"{request_id:016x} has used all pages promised to it on cp rank {cp_rank}")
        allocator = self._allocators[cp_rank]
        while allocator.num_free < count and self._cache.num_idle(cp_rank):
            allocator.evict(self._cache.evict(cp_rank))
        self._hold(holding, cp_rank, count)
        holding.begun[cp_rank] += count
        return allocator.take(request_id, count)

    def _hold(self, holding: Holding, cp_rank: int, pages: int) -> None:
        """So many pages more on a cp rank, or less."""
        before = holding.open_share(cp_rank)
        holding.held[cp_rank] += pages
        self._promised[cp_rank] += holding.open_share(cp_rank) - before

    def _borrow(self, holding: Holding, cp_rank: int, pages: int) -> None:
        holding.borrowed[cp_rank] += pages
        self._promised[cp_rank] += pages

    def _set_share(self, holding: Holding, share: list[int]) -> None:
        for cp_rank, pages in enumerate(share):
            before = holding.open_share(cp_rank)
            holding.share[cp_rank] = pages
            self._promised[cp_rank] += holding.open_share(cp_rank) - before

    def _let_go(self, request_id: int, digests: Sequence[bytes]) -> None:
        for place, was_first, heir in self._cache.release(digests, reader=request_id):
            if heir is None:
                self._allocators[place.cp_rank].evict(place.page)
            if self.window and not was_first:
                self._borrow(self._holdings[request_id], place.cp_rank, -1)
            elif self.window and heir is not None:
                self._borrow(self._holdings[heir], place.cp_rank, -1)

    def _count_borrowed(self, request_id: int, holding: Holding) -> list[int]:
        counts = [0] * self._cp
        if self.window:
            for place, digest in holding.shared.items():
                if not self._cache.is_first(digest, reader=request_id):
                    counts[holding.cp_ranks[place - holding.first_page]] += 1
        return counts
