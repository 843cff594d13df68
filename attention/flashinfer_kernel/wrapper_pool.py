"""Long-lived FlashInfer wrappers, lent to one plan at a time.

A wrapper holds the schedule of its last plan, and making one allocates megabytes of pinned memory: so plans that are
in flight together need one each, and later plans take them over.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

WrapperT = TypeVar("WrapperT")


@dataclass(kw_only=True, eq=False)
class Loan(Generic[WrapperT]):
    """A wrapper, and the moment from which its host buffer may be written again."""

    wrapper: WrapperT
    copied: torch.cuda.Event | None = None

    def mark_planned(self, device: torch.device) -> None:
        """Call after planning: the copy of the host buffer to the device has been enqueued."""
        if device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(device))


class WrapperPool(Generic[WrapperT]):
    """Lends wrappers that `create` makes; as many exist as were ever lent at once.

    Plans and runs of all of them are enqueued on one stream, in order: that alone keeps a new plan's copy behind the
    old plan's kernels.
    """

    def __init__(self, create: Callable[[], WrapperT]) -> None:
        self._create = create
        self._idle: deque[Loan[WrapperT]] = deque()

    def lend(self) -> Loan[WrapperT]:
        """A wrapper that nobody else holds.

        Blocking until the last plan's copy has left the wrapper's host buffer, which planning would overwrite.
        """
        loan = self._idle.popleft() if self._idle else Loan(wrapper=self._create())
        if loan.copied is not None:
            loan.copied.synchronize()
        return loan

    def take_back(self, loan: Loan[WrapperT], *, after: object) -> None:
        """Lends it again once `after` is garbage."""
        weakref.finalize(after, self._idle.append, loan)
