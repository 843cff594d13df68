"""The pages of one cp rank in one cache group: which are free, whose the others are."""

from collections.abc import Iterable, Sequence


class PageAllocator:
    """The pages 0..num_pages-1: each is free, has exactly one owner, or is the prefix cache's."""

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

    def take(self, owner: int, count: int = 1) -> list[int]:
        """Gives `owner` so many pages and returns their numbers; ValueError where fewer are free."""
        if len(self._free) < count:
            raise ValueError(f"{count} pages are not free for {owner:016x}: of {self._num_pages} {self.num_free} are")
        first = len(self._free) - count
        pages = self._free[first:]
        del self._free[first:]
        pages.reverse()
        self._owners.update(dict.fromkeys(pages, owner))
        return pages

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
        found = self._owners.pop(page, None)
        if found != owner:
            raise ValueError(f"page {page} is not owned by {owner:016x} but by {found}")
