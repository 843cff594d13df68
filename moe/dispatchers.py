"""The dispatchers of one block, and the one that a step takes."""

import torch

from moe.all_to_all_dispatch import AllToAllDispatcher
from moe.dispatch import Dispatcher, LocalDispatcher
from moe.dispatch_choice import Dispatch, DispatchPolicy
from moe.gather_dispatch import GatherDispatcher
from parallel.collectives.communicator import Communicator


class Dispatchers:
    """Shared by all layers of a rank, which run one after the other."""

    def __init__(
        self, block: Communicator, *, policy: DispatchPolicy, slots_per_rank: int, device: torch.device
    ) -> None:
        self.index = block.index
        self._policy = policy
        self._by_kind: dict[Dispatch, Dispatcher] = {
            Dispatch.GATHER: GatherDispatcher(block),
            Dispatch.ALL_TO_ALL: AllToAllDispatcher(
                block, ep_ranks=policy.sizes.block_ep_ranks, slots_per_rank=slots_per_rank, device=device
            ),
        }
        if block.size == 1:
            self._by_kind = dict.fromkeys(Dispatch, LocalDispatcher())

    def choose(self, *, padded_rows: int) -> Dispatcher:
        """The one for a step whose ranks have up to `padded_rows` rows; all ranks of the block choose alike."""
        return self._by_kind[self._policy.choose(padded_rows=padded_rows)]
