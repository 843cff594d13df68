"""How one chunk of a prompt is cut over the cp coordinates: zigzag blocks that end at page boundaries.

```
positions   |cached ......|new ...............................................|
pages       | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |          page 3 is half full
                         ^^^  continues page 3: a segment of its own, on that page's owner
                             | b0| b1| b2| b3|...   the new pages in 2·cp blocks, block b on coordinate
                                                    (offset + min(b, 2·cp-1-b)) mod cp
```
Causal work grows with the position, so a coordinate that takes block b and block 2·cp-1-b does its even share
("Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783, section 3.4.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The positions [start, end) of a chunk, whose queries, keys and values one cp coordinate works on."""

    coordinate: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class ChunkCut:
    """A chunk's segments in order of position, and the owner of each page that the chunk begins."""

    segments: tuple[Segment, ...]
    new_page_owners: tuple[int, ...]


def cut_chunk(
    *, cached_tokens: int, new_tokens: int, page_size: int, cp: int, offset: int, page_owners: Sequence[int]
) -> ChunkCut:
    """Cuts the positions [cached_tokens, cached_tokens + new_tokens).

    `page_owners` holds the coordinate of each page that the sequence has before this chunk, in table order.
    Neighbouring segments of one coordinate are joined. ValueError where the pages do not match the cached tokens.
    """
    if new_tokens < 1 or cached_tokens < 0:
        raise ValueError(f"a chunk has one new token or more, but got {new_tokens} after {cached_tokens} cached")
    if len(page_owners) != -(-cached_tokens // page_size):
        raise ValueError(f"{cached_tokens} cached tokens fill {-(-cached_tokens // page_size)} pages of {page_size}, "
                         f"but the table has {len(page_owners)}")  # fmt: skip
    end = cached_tokens + new_tokens
    first_new_page = len(page_owners)
    pages = -(-end // page_size) - first_new_page
    owners = [block_owner(block, cp=cp, offset=offset) for block in _block_of_pages(max(pages, 0), 2 * cp)]
    segments: list[Segment] = []
    boundary = min(first_new_page * page_size, end)
    if boundary > cached_tokens:
        segments.append(Segment(coordinate=page_owners[-1], start=cached_tokens, end=boundary))
    for index, owner in enumerate(owners):
        start = (first_new_page + index) * page_size
        _extend(segments, Segment(coordinate=owner, start=start, end=min(start + page_size, end)))
    return ChunkCut(segments=tuple(segments), new_page_owners=tuple(owners))


def block_owner(block: int, *, cp: int, offset: int) -> int:
    """The coordinate of zigzag block `block` of 2·cp."""
    return (offset + min(block, 2 * cp - 1 - block)) % cp


def new_page_counts(*, pages: int, cp: int, offset: int) -> tuple[int, ...]:
    """How many of a chunk's `pages` new pages each coordinate takes: never more than ⌈pages / cp⌉."""
    counts = [0] * cp
    for block in _block_of_pages(pages, 2 * cp):
        counts[block_owner(block, cp=cp, offset=offset)] += 1
    return tuple(counts)


def choose_offset(*, pages: int, cp: int, held: Sequence[int], load: Sequence[int]) -> int:
    """The offset that keeps a sequence even over its coordinates and, where that leaves a choice, the pool too.

    `held` counts the pages that each coordinate holds of this sequence, `load` those of all sequences. Over whole
    blocks a chunk adds one page to each coordinate of an arc of the circle. Where the fuller coordinates are an arc,
    one that begins at its end keeps them so, and no coordinate ever has two pages more than another. Evenness alone
    is not enough: fuller coordinates that lie apart leave no room for the next arc, and from five coordinates on
    chunks of equal size then pile up without bound.
    """

    def cost(offset: int) -> tuple[int, int, int, int]:
        counts = new_page_counts(pages=pages, cp=cp, offset=offset)
        after = [held[index] + counts[index] for index in range(cp)]
        edges = sum(after[index] != after[index - 1] for index in range(cp))
        # Least for the emptiest coordinates; the largest load alone would not tell those below it apart.
        pool = sum((load[index] + counts[index]) ** 2 for index in range(cp))
        return max(after) - min(after), edges, pool, offset

    return min(range(cp), key=cost)


def admission_bound(*, pages: int, cp: int) -> int:
    """How many pages of a prompt of `pages` pages any one coordinate may come to hold."""
    return min(-(-pages // cp) + 2, pages) if cp > 1 else pages


def _block_of_pages(pages: int, blocks: int) -> list[int]:
    """The block of each page: consecutive, sizes differing by at most one, larger ones first."""
    size, extra = divmod(pages, blocks)
    return [block for block in range(blocks) for _ in range(size + (block < extra))]


def _extend(segments: list[Segment], segment: Segment) -> None:
    if segments and segments[-1].coordinate == segment.coordinate and segments[-1].end == segment.start:
        segment = Segment(coordinate=segment.coordinate, start=segments.pop().start, end=segment.end)
    segments.append(segment)
