"""Full pages that outlive their sequence, found again by what they hold: one cache for each dp coordinate.

A page's key is a digest chained over all tokens up to its end, begun with the model's revision: so it says which prefix
the KV belongs to, whatever the page size was. A page here is read by any number of sequences and written by none; those
that nobody reads are evicted, least recently used first, when their cp rank needs a page.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from parallel.handoff import PagePlace


class PageKeys:
    """The key of each full page of one sequence: 16 bytes, the digest of `salt` and all tokens up to the page's end."""

    def __init__(self, *, page_size: int, salt: bytes) -> None:
        self._page_size = page_size
        self._chain = hashlib.blake2b(salt, digest_size=16)
        self.digests: list[bytes] = []

    def extend(self, token_ids: Sequence[int], *, end: int) -> None:
        """Takes the sequence's tokens up to `end`; those of pages that have a key already are not looked at again."""
        size = self._page_size
        for first in range(len(self.digests) * size, end - size + 1, size):
            self._chain.update(array("I", token_ids[first : first + size]).tobytes())
            self.digests.append(self._chain.digest())


class PrefixCache:
    """Keys to pages. `readers` counts the sequences whose tables have a page; a page without readers is idle."""

    def __init__(self, *, cp: int) -> None:
        self._places: dict[bytes, PagePlace] = {}
        self._readers: dict[bytes, int] = {}
        self._idle: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(cp)]
        self._withdrawn: set[bytes] = set()

    def match(self, digests: Iterable[bytes]) -> list[PagePlace]:
        """The places of the longest run of `digests`, from the first on, that is here."""
        found = []
        for digest in digests:
            place = self._places.get(digest)
            if place is None or digest in self._withdrawn:
                break
            found.append(place)
        return found

    def num_idle(self) -> list[int]:
        """For each cp rank, the pages that nobody reads."""
        return [len(idle) for idle in self._idle]

    def idle_among(self, digests: Iterable[bytes]) -> list[int]:
        """For each cp rank, how many of the pages of `digests` are idle now."""
        counts = [0] * len(self._idle)
        for digest in digests:
            if not self._readers[digest]:
                counts[self._places[digest].coordinate] += 1
        return counts

    def acquire(self, digest: bytes) -> PagePlace:
        """One more reader of a page that is here."""
        place = self._places[digest]
        self._readers[digest] += 1
        self._idle[place.coordinate].pop(digest, None)
        return place

    def publish(self, digest: bytes, place: PagePlace) -> bool:
        """Takes a page over, with one reader; False where another page has this key already."""
        if digest in self._places:
            return False
        self._places[digest], self._readers[digest] = place, 1
        return True

    def withdraw(self, digests: Iterable[bytes]) -> None:
        """Pages that are read here, and that nobody is to find any more; they go with their last reader."""
        self._withdrawn.update(digests)

    def release(self, digests: Sequence[bytes]) -> list[PagePlace]:
        """One reader less of each page, given in order of position; the end of a prefix is evicted before its start.

        Returns the places of withdrawn pages that nobody reads any more: they are here no longer.
        """
        gone = []
        for digest in reversed(digests):
            self._readers[digest] -= 1
            if self._readers[digest]:
                continue
            if digest in self._withdrawn:
                self._withdrawn.remove(digest)
                del self._readers[digest]
                gone.append(self._places.pop(digest))
            else:
                self._idle[self._places[digest].coordinate][digest] = None
        return gone

    def evict(self, cp_rank: int) -> int:
        """Gives up the idle page of `cp_rank` that was used least recently, and returns its number."""
        digest, _ = self._idle[cp_rank].popitem(last=False)
        del self._readers[digest]
        return self._places.pop(digest).page

    def pages(self) -> list[list[int]]:
        """For each cp rank, its pages that are here."""
        found: list[list[int]] = [[] for _ in self._idle]
        for place in self._places.values():
            found[place.coordinate].append(place.page)
        return found

    def check_integrity(self, readers: Iterable[bytes]) -> None:
        """AssertionError unless `readers`, the keys in all tables, are those that are counted."""
        counts = dict.fromkeys(self._places, 0)
        for digest in readers:
            counts[digest] += 1
        assert counts == self._readers, "the readers of cached pages are not those in the tables"
        idle = {digest for part in self._idle for digest in part}
        assert idle == {digest for digest, count in counts.items() if not count}, "an idle page has readers"
