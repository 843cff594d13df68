"""What an exchange knows of one chunk, alike on every cp rank, and what a segment's rows see of a coordinate's pages.

```
table        c0 c1 c1 c0 | c0 c1            pages by owner; a segment lies on pages of its own coordinate only
segment                    [== c0 ==)       so of another coordinate it sees whole pages, all of those before it,
sees of c0   p  -  -  p    p                and of its own a prefix that ends with itself: bottom-right causal
sees of c1   -  p  p  -
```
"""

from collections.abc import Sequence
from dataclasses import dataclass

from attention.interface import AttentionRows
from parallel.chunk import Segment
from parallel.page_table import PageTable


@dataclass(frozen=True, kw_only=True)
class ExchangeChunk:
    """The positions [cached_tokens, end) of a sequence, cut into `segments` in order of position."""

    table: PageTable
    segments: Sequence[Segment]
    cached_tokens: int
    end: int

    @property
    def new_tokens(self) -> int:
        """Number of query rows over all coordinates."""
        return self.end - self.cached_tokens

    def segments_of(self, coordinate: int) -> Sequence[Segment]:
        """Those that `coordinate` works on."""
        return [segment for segment in self.segments if segment.coordinate == coordinate]

    def rows_of(self, coordinate: int) -> int:
        """Query rows that `coordinate` works on."""
        return sum(segment.end - segment.start for segment in self.segments_of(coordinate))

    def num_pages_of(self, coordinate: int, *, page_size: int) -> int:
        """How many pages `coordinate` owns of the whole sequence up to the chunk's end."""
        return self.table.count_of(coordinate, before=-(-self.end // page_size))

    def pages_of(self, coordinate: int, *, page_size: int) -> Sequence[int]:
        """The pages that `coordinate` owns of the whole sequence up to the chunk's end."""
        return self.table.pages_of(coordinate, before=-(-self.end // page_size))


def rows_seeing(chunk: ExchangeChunk, segment: Segment, *, coordinate: int, page_size: int) -> AttentionRows:
    """The rows of `segment` over the pages that `coordinate` owns, by that coordinate's own page numbers."""
    num_rows = segment.end - segment.start
    if segment.coordinate == coordinate:
        pages = chunk.table.pages_of(coordinate, before=-(-segment.end // page_size))
        kv_len = len(pages) * page_size - (-segment.end % page_size)
        return AttentionRows(num_rows=num_rows, kv_len=kv_len, page_table=pages)
    # A segment that begins inside a page continues a page of its own coordinate: the others' are full.
    pages = chunk.table.pages_of(coordinate, before=segment.start // page_size)
    return AttentionRows(num_rows=num_rows, kv_len=len(pages) * page_size, page_table=pages, causal=False)
