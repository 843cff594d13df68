"""What one sequence has of one cache group: its table, and counts of it by cp rank."""

from array import array
from dataclasses import dataclass
from typing import TypeAlias

Column: TypeAlias = "array[int]"


@dataclass(kw_only=True, slots=True)
class Holding:
    """The table from `first_page` on as columns, int32; of its pages those that are `shared` with the prefix cache, by
    place in the table.

    By cp rank: `share` is promised, `held` are in the table, `begun` were taken by its own chunks, `borrowed` are held
    and count for another sequence.
    """

    share: list[int]
    held: list[int]
    begun: list[int]
    borrowed: list[int]
    first_page: int
    cp_ranks: Column
    pages: Column
    shared: dict[int, bytes]

    @property
    def end_page(self) -> int:
        """The place in the table behind its last page."""
        return self.first_page + len(self.pages)

    def open_share(self, cp_rank: int) -> int:
        """What is promised to it on a cp rank and not held."""
        return max(self.share[cp_rank] - self.held[cp_rank], 0)

    def own_pages(self, cp_rank: int) -> list[int]:
        """Its pages on a cp rank that are not the cache's."""
        table = zip(self.cp_ranks, self.pages, strict=True)
        return [
            page
            for place, (owner, page) in enumerate(table, self.first_page)
            if owner == cp_rank and place not in self.shared
        ]


def empty_holding(*, cp: int, first_page: int) -> Holding:
    """A table without pages, of a sequence to which nothing is promised yet."""
    share, held, begun, borrowed = ([0] * cp for _ in range(4))
    return Holding(
        share=share,
        held=held,
        begun=begun,
        borrowed=borrowed,
        first_page=first_page,
        cp_ranks=array("i"),
        pages=array("i"),
        shared={},
    )
