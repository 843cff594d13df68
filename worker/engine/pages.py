"""The pages of one dp coordinate: those of each cache group, and what is alike in all of them.

All groups have the same page size, and the pages that a prompt's chunk begins have the same owners in all of them.
Where a decoding sequence's next page lies is each group's own matter: with a window on the sequence's home, which then
holds all that is seen; else where the sequence and the pool have fewest.
"""

from array import array
from collections.abc import Sequence

import numpy as np

from parallel.arrays import Ints
from parallel.chunk import choose_offset, new_page_owners
from parallel.page_columns import packed
from parallel.settings import EngineSettings
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from worker.engine.group_pages import GroupPages
from worker.engine.holding import Column, Holding
from worker.engine.page_allocator import PageAllocator


class DpPages:
    """By request, over all groups: promises, tables and the pages that the next step begins."""

    def __init__(self, groups: Sequence[CacheGroup], *, cp: int, pp: int, settings: EngineSettings) -> None:
        self.groups = [GroupPages(group, cp=cp, pp=pp, settings=settings) for group in groups]
        self._cp = cp
        self._page_size = settings.page_size
        self._full = [group for group in self.groups if not group.window]
        self._windows = [group for group in self.groups if group.window]
        #: Whose pages say where those of a chunk go.
        self._leading = (self._full or self.groups)[0]
        self._new_pages = [_NewPages() for _ in self.groups]

    @property
    def allocators(self) -> list[PageAllocator]:
        """One for each cp rank of each group."""
        return [allocator for group in self.groups for allocator in group.allocators]

    @property
    def windows(self) -> list[int]:
        """The windows of those groups that have one."""
        return [group.window for group in self._windows]

    @property
    def num_free(self) -> int:
        """Pages over all cp ranks that are neither owned nor promised; those that the cache would give up count. Of the
        groups that see everything, for there a sequence's length is bounded; where none does, of the first.
        """
        return sum(sum(group.available()) for group in self._full or self.groups[:1])

    # ---- promises ----

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """How many pages of a prefix are cached: the most of which groups that see everything have all, and groups with
        a window those that are seen behind it. Looks at each page once: a prompt at the head of the queue may be long,
        and most often its windows' pages are gone.
        """
        end = min((group.num_cached(digests) for group in self._full), default=len(digests))
        windows = [(group.pages_behind, group.has_cached) for group in self._windows]
        deepest = max((depth for depth, _ in windows), default=0)
        for place in reversed(range(end)):
            if place < end - deepest:
                break
            # A longer prefix would see the page that is lacking, too.
            if any(place >= end - depth and not has_cached(digests[place]) for depth, has_cached in windows):
                end = place
        return end

    def fits(self, num_pages: int, *, cached: Sequence[bytes] = ()) -> bool:
        """Whether a sequence of `num_pages` pages may come in now, of which the first `cached` are found."""
        return all(group.fits(num_pages, cached=cached) for group in self.groups)

    def promise(self, request_id: int, num_pages: int, *, cached: Sequence[bytes] = ()) -> None:
        """Lets a sequence of `num_pages` pages in, whose tables begin with the cache's `cached`."""
        for group in self.groups:
            group.promise(request_id, num_pages, cached=cached)

    def can_reserve(self, *, prompt_tokens: int, num_pages: int, home: int) -> bool:
        """Whether `reserve` would find its pages now."""
        return all(
            group.can_reserve(prompt_tokens=prompt_tokens, num_pages=num_pages, home=home) for group in self.groups
        )

    def reserve(self, request_id: int, *, prompt_tokens: int, num_pages: int, home: int) -> None:
        """Takes the pages of a sequence whose KV is on its way, and promises what it may need after that."""
        for group in self.groups:
            group.reserve(request_id, prompt_tokens=prompt_tokens, num_pages=num_pages, home=home)

    def settle(self, request_id: int, *, home: int | None) -> None:
        """All of its prompt's pages are begun. It will begin no more, or, where it has a home, those of its output."""
        for group in self.groups:
            if group.window or home is None:
                group.settle(request_id, home=home)

    # ---- pages ----

    def columns(self, request_id: int) -> list[control_pb2.Pages]:
        """The request's tables, by group."""
        return [group.columns(request_id) for group in self.groups]

    def holdings(self, request_id: int) -> list[Holding]:
        """What the request has, by group. To be read only."""
        return [group.holding(request_id) for group in self.groups]

    def most_to_begin(self, request_id: int) -> int | None:
        """How many pages a chunk of the request may begin now, wherever they go; None where that has no bound.

        No cp rank takes more than its part of them, rounded up.
        """
        rooms = [min(group.room(request_id)) for group in self._windows]
        return self._cp * min(rooms) if rooms else None

    def begin_chunk(self, request_id: int, *, slot: int, start: int, end: int) -> Ints:
        """Begins the pages of a prompt's positions [start, end); returns the owners of all of their pages."""
        first, begun, last = start // self._page_size, -(-start // self._page_size), -(-end // self._page_size)
        owners = self._owners_of_new(request_id, last - begun)
        if last > begun:
            for group, new in zip(self.groups, self._new_pages, strict=True):
                new.add(slot, owners, group.begin(request_id, owners))
        holding = self._leading.holding(request_id)
        return np.asarray(holding.cp_ranks[first - holding.first_page :])

    def has_page(self, request_id: int, *, home: int) -> bool:
        """Whether a decoding sequence may begin a page now. Not where steps in flight still hold what it will have."""
        return all(group.room(request_id)[home] > 0 for group in self._windows)

    def begin_page(self, request_id: int, *, slot: int, place: int, home: int) -> None:
        """Begins the page at `place` of a decoding sequence's tables where it has not been reserved."""
        for group, new in zip(self.groups, self._new_pages, strict=True):
            if group.holding(request_id).end_page <= place:
                cp_rank = home if group.window else group.emptiest(request_id)
                new.add_one(slot, cp_rank, group.begin_one(request_id, cp_rank))

    def take_new_pages(self) -> list[step_pb2.NewPages]:
        """What was begun since the last call, by group."""
        taken = [new.message() for new in self._new_pages]
        self._new_pages = [_NewPages() for _ in self.groups]
        return taken

    def publish(self, request_id: int, digests: Sequence[bytes], *, first: int) -> None:
        """The request's pages from the place `first` on are full and have the keys `digests`: others may read them."""
        for group in self.groups:
            group.publish(request_id, digests, first=first)

    def withdraw(self, digests: Sequence[bytes]) -> None:
        """Nobody finds pages of these keys any more."""
        for group in self.groups:
            group.withdraw(digests)

    def release_unseen(self, request_id: int, *, end: int) -> bool:
        """No query before position `end` is still to be computed: what lies behind a window there returns. Whether more
        may be promised than before.
        """
        freed = [group.release_before(request_id, group.first_seen(end)) for group in self._windows]
        return any(freed)

    def release(self, request_id: int) -> None:
        """Gives all pages and promises of the request up."""
        for group in self.groups:
            group.release(request_id)

    def check_integrity(self, *, is_idle: bool) -> None:
        """AssertionError unless in each group every page is free, in exactly one table or the cache's, promises are
        covered and, when idle, all are free: the cache gives up whatever it has.
        """
        for group in self.groups:
            group.check_integrity()
            assert not is_idle or group.available() == [group.num_pages] * self._cp, "an idle replica holds pages"

    def _owners_of_new(self, request_id: int, pages: int) -> Ints:
        """The cp ranks of the next pages of a prompt: pages of the prefix cache lie as they lie, and what is new is
        spread evenly for itself, as was promised.
        """
        offset = 0
        if self._cp > 1 and pages:
            begun = self._leading.holding(request_id).begun
            offset = choose_offset(pages=pages, cp=self._cp, held=begun, load=self._leading.load())
        return new_page_owners(pages=pages, cp=self._cp, offset=offset)


class _NewPages:
    """Columns of the pages that a step begins in one group."""

    def __init__(self) -> None:
        self._slots = array("i")
        self._cp_ranks = array("i")
        self._pages = array("i")

    def add(self, slot: int, owners: Ints, pages: Column) -> None:
        self._slots.extend([slot] * len(pages))
        self._cp_ranks.frombytes(owners.astype(np.int32).tobytes())
        self._pages.extend(pages)

    def add_one(self, slot: int, cp_rank: int, page: int) -> None:
        self._slots.append(slot)
        self._cp_ranks.append(cp_rank)
        self._pages.append(page)

    def message(self) -> step_pb2.NewPages:
        return step_pb2.NewPages(slots=packed(self._slots), cp_ranks=packed(self._cp_ranks), pages=packed(self._pages))
