"""The contract of an attention kernel: `plan` once a step on the host, `run` once a layer on the device.

Shapes: T query rows, Hq query heads, Hkv KV heads, D head size, P page size, N pages of memory.
KV memory of one layer is head-major, `[N, 2, Hkv, P, D]`: K at index 0, V at index 1 of the second dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What all layers of one cache group share on one rank: its own heads, not the model's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """Consecutive query rows of one sequence, and the KV that they see.

    The rows stand at the positions [kv_len - num_rows, kv_len) where `causal`, so row i sees the first
    kv_len - num_rows + i + 1 positions (a bottom-right mask); each row sees all kv_len positions where not.
    `page_table` lists ⌈kv_len / page_size⌉ pages of the memory given to `run`, in order of position.
    """

    num_rows: int
    kv_len: int
    page_table: Sequence[int]
    causal: bool = True


@dataclass(frozen=True, kw_only=True)
class KvWrite:
    """Where new K and V rows go: row i to page `pages[i]`, position `offsets[i]` inside it (int64, on the device)."""

    pages: torch.Tensor
    offsets: torch.Tensor


class AttentionPlan(Protocol):
    """One step's attention, the same for every layer of a cache group."""

    def run(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Attention of q [T, Hq, D] over the layer memory kv [N, 2, Hkv, P, D]; returns [T, Hq, D]. Scales by `scale`.

        kv is contiguous, and V in it finite everywhere, also where nothing was written yet: memory starts as zeros,
        because the values that a row does not see are multiplied too, by zero. K may be NaN: scores are selected, never
        added to. A row that sees nothing gives zeros, one that sees a NaN key gives NaN.
        """
        ...

    def run_with_lse(self, q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, and the natural log-sum-exp of the scaled scores, float32 [T, Hq].

        A row that sees nothing gives zeros and -inf.
        """
        ...


class AttentionBackend(Protocol):
    """One kind of kernel on one device."""

    def plan(self, rows: Sequence[AttentionRows]) -> AttentionPlan:
        """Plans attention for rows that follow each other in q in the order given; they may be none."""
        ...

    def write(self, kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: KvWrite) -> None:
        """Writes k and v, each [T, Hkv, D], into the layer memory kv [N, 2, Hkv, P, D]; T may be 0.

        What holds no numbers is stored as `broken_rows` says, so that V stays finite.
        """
        ...

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merges S partial results over disjoint KV: outputs [S, T, Hq, D], natural lses [S, T, Hq].

        Returns [T, Hq, D] and the merged natural log-sum-exp [T, Hq]. Parts that saw nothing have -inf and count
        nothing; where all parts saw nothing the result is zeros and -inf.
        """
        ...
