"""What an operation on rows, and a product with a fixed weight, is to those who use it."""

from collections.abc import Callable
from typing import Protocol

import torch

#: What is done to each row by itself: [T, in] to [T, out].
RowOperation = Callable[[torch.Tensor], torch.Tensor]


class Linear(Protocol):
    """A product with a fixed weight."""

    def __call__(self, x: torch.Tensor, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] to [T, out], on top of `plus` [T, out] where that is given, which stays as it is."""
        ...
