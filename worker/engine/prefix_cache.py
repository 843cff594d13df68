"""Full pages that outlive their sequence, found again by what they hold: one cache for each group and dp coordinate.

A page's key is a digest chained over all tokens up to its end, begun with the model's revision: so it says which prefix
the KV belongs to, whatever the page size was. A page here is read by any number of sequences and written by none; those
that nobody reads are evicted, least recently used first, when their cp rank needs a page.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PageKeys:
    """The key of each full page of one sequence: 16 bytes, the digest of `salt` and all tokens up to the page's end."""

    def __init__(self, *, page_size: int, salt: bytes) -> None:
        self._page_size = page_size
        self._chain = hashlib.blake2b(salt, digest_size=16)
        self.digests: list[bytes] = []

    def extend(self, token_ids: Sequence[int], *, end: int) -> None:
        """Takes the sequence's tokens up to `end`; those of pages that have a key already are not looked at again."""
        size, start = self._page_size, len(self.digests) * self._page_size
        new = memoryview(array("I", token_ids[start:end]))
        for first in range(0, len(new) - size + 1, size):
            self._chain.update(new[first : first + size])
            self.digests.append(self._chain.digest())


class CachedPage(NamedTuple):
    """Where a page lies: the cp rank that owns it, and its number there."""

    cp_rank: int
    page: int


class Let(NamedTuple):
    """A page that a reader let go, and that is not simply idle now. Without an heir it is here no longer; else others
    read it: `was_first` says that the reader had read it for longer than they, and `heir` is who has now.
    """

    place: CachedPage
    was_first: bool
    heir: int | None


class PrefixCache:
    """Keys to pages. Of each its readers are known, the requests whose tables have it, in the order in which they came;
    a page without readers is idle.
    """

    def __init__(self, *, cp: int) -> None:
        self._places: dict[bytes, CachedPage] = {}
        self._readers: dict[bytes, list[int]] = {}
        self._idle: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(cp)]
        self._withdrawn: set[bytes] = set()

    def has(self, digest: bytes) -> bool:
        """Whether a page of that key is to be found here."""
        return digest in self._places and digest not in self._withdrawn

    def num_first(self, digests: Iterable[bytes]) -> int:
        """How many of `digests`, from the first on, are here without a gap."""
        count = 0
        for digest in digests:
            if not self.has(digest):
                break
            count += 1
        return count

    def num_idle(self, cp_rank: int) -> int:
        """The pages of a cp rank that nobody reads."""
        return len(self._idle[cp_rank])

    def idle_among(self, digests: Iterable[bytes]) -> list[int]:
        """For each cp rank, how many of the pages of `digests` are idle now."""
        counts = [0] * len(self._idle)
        for digest in digests:
            if not self._readers[digest]:
                counts[self._places[digest].cp_rank] += 1
        return counts

    def acquire(self, digest: bytes, *, reader: int) -> tuple[CachedPage, bool]:
        """One more reader of a page that is here: the page, and whether others were reading it."""
        place, readers = self._places[digest], self._readers[digest]
        if not readers:
            del self._idle[place.cp_rank][digest]
        readers.append(reader)
        return place, len(readers) > 1

    def publish(self, digest: bytes, place: CachedPage, *, reader: int) -> bool:
        """Takes a page over, with one reader; False where another page has this key already."""
        if digest in self._places:
            return False
        self._places[digest], self._readers[digest] = place, [reader]
        return True

    def withdraw(self, digests: Iterable[bytes]) -> list[CachedPage]:
        """Nobody is to find the pages of these keys any more: returns those that are here no longer, which nobody read.
        The others go with their last reader.
        """
        gone = []
        for digest in digests:
            if self._readers.get(digest):
                self._withdrawn.add(digest)
            elif digest in self._places:
                place = self._places.pop(digest)
                del self._readers[digest], self._idle[place.cp_rank][digest]
                gone.append(place)
        return gone

    def release(self, digests: Iterable[bytes], *, reader: int) -> list[Let]:
        """One reader less of each page; they come last page first, for a prefix is evicted from its end."""
        found = []
        for digest in digests:
            place, readers = self._places[digest], self._readers[digest]
            was_first = readers[0] == reader
            readers.remove(reader)
            if readers:
                found.append(Let(place, was_first, readers[0]))
            elif digest in self._withdrawn:
                self._withdrawn.remove(digest)
                del self._readers[digest], self._places[digest]
                found.append(Let(place, was_first, None))
            else:
                self._idle[place.cp_rank][digest] = None
        return found

    def is_first(self, digest: bytes, *, reader: int) -> bool:
        """Whether `reader` has read a page for longer than all others."""
        return self._readers[digest][0] == reader

    def evict(self, cp_rank: int) -> int:
        """Gives up the idle page of `cp_rank` that was used least recently, and returns its number."""
        digest, _ = self._idle[cp_rank].popitem(last=False)
        del self._readers[digest]
        return self._places.pop(digest).page

    def pages(self) -> list[list[int]]:
        """For each cp rank, its pages that are here."""
        found: list[list[int]] = [[] for _ in self._idle]
        for place in self._places.values():
            found[place.cp_rank].append(place.page)
        return found

    def check_integrity(self, readers: Iterable[tuple[int, bytes]]) -> None:
        """AssertionError unless `readers`, the requests and keys of all tables, are those that are known."""
        found: dict[bytes, list[int]] = {digest: [] for digest in self._places}
        for reader, digest in readers:
            found[digest].append(reader)
        known = {digest: sorted(items) for digest, items in self._readers.items()}
        assert {digest: sorted(items) for digest, items in found.items()} == known, (
            "the readers of cached pages are not those in the tables"
        )
        idle = {digest for part in self._idle for digest in part}
        assert idle == {digest for digest, items in found.items() if not items}, "an idle page has readers"
