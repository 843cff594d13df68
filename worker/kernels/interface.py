"""What blocks ask of the arithmetic under them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.experts import Experts, ExpertWeights
from moe.gate import Gate
from moe.linear import Linear, RowOperation
from moe.slots import SlotMap
from parallel.models.gates import Activation, GateSpec
from proto import control_pb2


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One row of logits: how to draw, and the position of the token that is drawn."""

    sampling: control_pb2.Sampling
    position: int


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The root mean square norm (arXiv 1910.07467) over rows [T, D], times `weight` [D]."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """What gives the heads of attention: the weights [heads · D, in] of q, k and v and their `biases`, or none; a norm
    that is done to each head of q, one [D] for all of them, and another to those of k, or none.
    """

    qkv: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    head_norms: tuple[Norm, Norm] | None
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def norm_of_heads(self) -> tuple[torch.Tensor | None, float]:
        """The norms as one weight [Hq + Hkv, D], None where there are none, and their epsilon."""
        if self.head_norms is None:
            return None, 0.0
        query, key = self.head_norms
        weights = [query.weight.expand(self.num_heads, -1), key.weight.expand(self.num_kv_heads, -1)]
        return torch.cat(weights), query.eps


class Heads(Protocol):
    """The heads of rows."""

    def __call__(
        self, x_TH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, H] to q [T, Hq, D], k and v [T, Hkv, D]. Of q and k the first 2 · F elements of a head are rotated by
        cos and sin [T, 1, F]: element i pairs with element i + F.

        ```
        |  0 .. F-1  |  F .. 2F-1  |  2F ..       |
        |  left      |  right      |  stays as is |
        ```
        """
        ...


class Kernels(Protocol):
    """Makes the operations of one rank's blocks. Where a product has a `norm`, that is done to its rows before."""

    @property
    def widens(self) -> bool:
        """Whether its weights may have fewer bits than the rows that they meet."""
        ...

    def linear(
        self, parts: Sequence[torch.Tensor], *, biases: Sequence[torch.Tensor] = (), norm: Norm | None = None
    ) -> Linear:
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
        norm: Norm | None = None,
    ) -> RowOperation:
        """x [T, in] -> activation of its products with gate and up [I, in]: [T, I]; `biases`, each [I], or none."""
        ...

    def heads(self, weights: HeadWeights, *, norm: Norm | None) -> Heads:
        """The products with q, k and v, and what is done to their heads."""
        ...

    def gate(
        self,
        spec: GateSpec,
        *,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        correction: torch.Tensor | None,
        norm: Norm,
        slots: SlotMap,
    ) -> Gate:
        """The gate with `weight` [E, H] and the vectors [E] that `spec` asks for; its rows leave normed."""
        ...

    def experts(self, weights: Sequence[ExpertWeights], *, first: int, activation: Activation) -> Experts:
        """The experts of the slots from `first` on, one of `weights` each; one that has two slots is held once."""
        ...

    def norm(self, norm: Norm) -> RowOperation:
        """The norm by itself."""
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
