"""How queries meet the KV that other cp coordinates hold. One strategy so far: gathering KV.

A strategy is planned once a step from the page tables that every cp rank knows, and run once a layer, after the new K
and V were written: it gives the memory that attention reads, and its plan gives the addresses of pages in that memory.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from parallel.communicator import Communicator
from parallel.handoff import PagePlace


class Exchange(Protocol):
    """One step's exchange over the cp group."""

    def address(self, table: Sequence[PagePlace]) -> Sequence[int]:
        """The pages of `table`, in order of position, as page numbers in the memory that `run` returns."""
        ...

    def run(self, kv: torch.Tensor) -> torch.Tensor:
        """Collective: from this rank's layer memory [N, 2, Hkv, P, D] to the memory that attention reads."""
        ...


class LocalExchange:
    """The group of one coordinate: it holds every page."""

    def address(self, table: Sequence[PagePlace]) -> Sequence[int]:
        """The pages' own numbers."""
        return [place.page for place in table]

    def run(self, kv: torch.Tensor) -> torch.Tensor:
        """The rank's own memory."""
        return kv


class GatherExchange:
    """Gathers the pages of the step's sequences from all coordinates into a workspace `[cp · padded, 2, Hkv, P, D]`.

    ```
    workspace   | pages of coordinate 0 ... pad | pages of coordinate 1 ... pad | ...
    ```
    Every coordinate contributes its pages in the order of the tables, padded to the longest contribution.
    """

    def __init__(self, group: Communicator, *, tables: Sequence[Sequence[PagePlace]], device: torch.device) -> None:
        self._group = group
        contributions: list[list[int]] = [[] for _ in range(group.size)]
        self._places: dict[PagePlace, tuple[int, int]] = {}
        for table in tables:
            for place in table:
                if place not in self._places:
                    mine = contributions[place.coordinate]
                    self._places[place] = (place.coordinate, len(mine))
                    mine.append(place.page)
        self._padded = max(map(len, contributions), default=0)
        own = contributions[group.index]
        own += [0] * (self._padded - len(own))
        self._own = torch.tensor(own, dtype=torch.int64, device=device)

    def address(self, table: Sequence[PagePlace]) -> Sequence[int]:
        """The pages' places in the workspace."""
        return [coordinate * self._padded + index for coordinate, index in (self._places[place] for place in table)]

    def run(self, kv: torch.Tensor) -> torch.Tensor:
        """Collective: the workspace of one layer."""
        return self._group.all_gather(kv.index_select(0, self._own)).flatten(0, 1)


def plan_exchange(group: Communicator, *, tables: Sequence[Sequence[PagePlace]], device: torch.device) -> Exchange:
    """The exchange of one step whose sequences have `tables`; every cp rank plans the same."""
    if group.size == 1:
        return LocalExchange()
    return GatherExchange(group, tables=tables, device=device)
