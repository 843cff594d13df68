"""What blocks ask of the arithmetic under them."""

from collections.abc import Sequence
from typing import Protocol

import torch

from moe.experts import Linear


class Kernels(Protocol):
    """Makes the operations of one rank's blocks."""

    def linear(self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = ()) -> Linear:
        """The product x [T, in] -> [T, out] with the weights of `parts`, each [out_i, in], stacked along out.

        `biases`, each [out_i], are one for each part, or none.
        """
        ...


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts as one tensor, along their first dimension."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
