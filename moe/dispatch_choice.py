"""Which dispatcher a step takes: a pure function of its rows, of ep and of top-k, as all ranks must choose alike.

With R rows a rank, a rank sends each way

    gather        (B - 1) R H e                          every row to every rank of the block, sums reduced back
    all-to-all    B R H e * (share of ranks that a row goes to)      and one message of counts more

and for all-to-all sorts its own rows by where they go, and adds up what comes back.
"""

from dataclasses import dataclass
from enum import Enum

from parallel.link import LinkSpeed
from parallel.shape import ExpertSizes


class Dispatch(Enum):
    """How rows get to their experts."""

    GATHER = "gather"
    ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True, kw_only=True)
class DispatchPolicy:
    """`forced` is what the configuration asks for, None for auto; `row_bytes` is H times the bytes of an element."""

    sizes: ExpertSizes
    top_k: int
    row_bytes: int
    link: LinkSpeed
    forced: Dispatch | None = None

    def choose(self, *, padded_rows: int) -> Dispatch:
        """The dispatcher for a step whose ranks have up to `padded_rows` rows."""
        if self.forced is not None:
            return self.forced
        own_bytes = padded_rows * self.row_bytes
        saved = 2 * own_bytes * self.sizes.moe_tp * (self.sizes.ep - 1 - self._other_ranks_of_a_row())
        sort_s = self.link.sort_s + own_bytes / self.link.sort_bytes_per_s
        return Dispatch.ALL_TO_ALL if saved / self.link.bytes_per_s > sort_s else Dispatch.GATHER

    def _other_ranks_of_a_row(self) -> float:
        """Other ep coordinates that an even gate sends a row to: each is missed by all top_k slots or it is not."""
        return (self.sizes.ep - 1) * (1 - (1 - 1 / self.sizes.ep) ** self.top_k)
