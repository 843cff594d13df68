"""What blocks ask of the arithmetic under them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.activation import Linear
from moe.experts import Experts, ExpertWeights
from parallel.models.gates import Activation
from proto import control_pb2


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One row of logits: how to draw, and the position of the token that is drawn."""

    sampling: control_pb2.Sampling
    position: int


#: What is done to each row by itself: [T, ...] to the same.
RowOperation = Callable[[torch.Tensor], torch.Tensor]


class Kernels(Protocol):
    """Makes the operations of one rank's blocks."""

    @property
    def widens(self) -> bool:
        """Whether its weights may have fewer bits than the rows that they meet."""
        ...

    def linear(self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = ()) -> Linear:
        """The product x [T, in] -> [T, out] with the weights of `parts`, each [out_i, in], stacked along out.

        `biases`, each [out_i], are one for each part, or none.
        """
        ...

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
        activation: Activation,
    ) -> Linear:
        """x [T, in] -> activation of its products with gate and up [I, in]: [T, I]; `biases`, each [I], or none."""
        ...

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """The experts of the slots from `first` on, one of `weights` each; one that has two slots is held once."""
        ...

    def norm(self, weight: torch.Tensor, *, eps: float) -> RowOperation:
        """The root mean square norm (arXiv 1910.07467) over the last dimension, times `weight`: [D] for rows [T, D], or
        one for each head [heads, D] for rows [T, heads, D].
        """
        ...

    def rotate(self, x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates the first 2 · F elements of each head, cos and sin [T, 1, F]: element i pairs with element i + F.

        ```
        |  0 .. F-1  |  F .. 2F-1  |  2F ..       |
        |  left      |  right      |  stays as is |
        ```
        """
        ...

    def draw(self, logits_SV: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a token from each row of float32 logits [S, V]: ids [S] (int64), and whether a row is finite, bool [S].

        A row that holds NaN or infinity has token 0, which is a legal one. Where a token lies within 1e-6 of an edge
        (the probability ahead of it of top_p, its own over the best one's of min_p) one implementation may keep what
        another leaves out.
        """
        ...


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts as one tensor, along their first dimension."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
