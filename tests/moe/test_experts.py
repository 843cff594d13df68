"""The experts of a rank against the definition, and the dispatcher's rows against what was sent."""

import pytest
import torch
import torch.nn.functional as F

from moe.activation import Gated
from moe.experts import TorchExperts
from moe.gate import choose_experts
from moe.gather_dispatch import GatherDispatcher
from moe.routed_rows import NO_SLOT, RoutedRows
from parallel.collectives.communicator import LocalCommunicator
from parallel.models.gates import SWIGLU, GateSpec, Scoring
from tests.harness.routed import routed
from worker.kernels.torch_kernels import PlainLinear

HIDDEN, WIDTH, EXPERTS, TOP_K = 12, 7, 6, 3
GATE = GateSpec(num_experts=EXPERTS, top_k=TOP_K, scoring=Scoring.SOFTMAX, renormalise=True)


class TwoRanks(LocalCommunicator):
    """A block of two ranks in one thread: gathers this rank's message with a given one, and adds a given sum."""

    size = 2

    def __init__(self, index: int, *, other: torch.Tensor) -> None:
        self.index = index
        self._other = other

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, self._other] if self.index == 0 else [self._other, x])

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.index]


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
    return gate_up, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator)


def run(first: int, count: int, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    gate_up, down = weights()
    experts = TorchExperts(
        first=first,
        gated=[Gated(PlainLinear(weight), SWIGLU) for weight in gate_up[first : first + count]],
        down=[PlainLinear(weight) for weight in down[first : first + count]],
    )
    return experts.run(routed(x, ids, shares))


def reference(x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    gate_up, down = weights()
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for expert, share in zip(ids[row].tolist(), shares[row].tolist(), strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            out[row] += share * (down[expert] @ (F.silu(gate) * up))
    return out


def rows(count: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, shares = choose_experts(torch.randn(count, EXPERTS, generator=generator) * 3, spec=GATE)
    return torch.randn(count, HIDDEN, generator=generator), ids, shares


def test_all_experts_on_one_rank_compute_the_definition() -> None:
    for count in (0, 1, 2, 17):
        x, ids, shares = rows(count)
        assert torch.allclose(run(0, EXPERTS, x, ids, shares), reference(x, ids, shares), atol=1e-4)


def test_the_shares_of_all_ranks_add_up_and_padding_adds_nothing() -> None:
    x, ids, shares = rows(9)
    total = sum((run(first, 2, x, ids, shares) for first in (0, 2, 4)), torch.zeros_like(x))
    assert torch.allclose(total, reference(x, ids, shares), atol=1e-4)
    padded = torch.full_like(ids, NO_SLOT)
    for first in (0, 2, 4):
        assert run(first, 2, x, padded, shares).abs().max() == 0


class Echo:
    """Experts that keep what they are given, and give each row back as it came."""

    def __init__(self) -> None:
        self.given: list[RoutedRows] = []

    def run(self, rows: RoutedRows, *, plus: torch.Tensor | None = None) -> torch.Tensor:
        self.given.append(rows)
        return rows.x.contiguous() if plus is None else plus + rows.x


def test_dispatch_brings_every_row_with_its_own_experts_and_weights() -> None:
    mine, others = routed(*rows(5)), routed(*rows(5, seed=2))
    mine.slots[3:] = NO_SLOT
    experts, residual = Echo(), torch.ones(3, HIDDEN)
    got = GatherDispatcher(TwoRanks(0, other=others.packed)).run(mine, experts, residual=residual)
    (seen,) = experts.given
    for part in ("x", "slots", "weights"):
        assert torch.equal(getattr(seen, part), torch.cat([getattr(mine, part), getattr(others, part)]))
    assert torch.equal(got, residual + mine.x[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_message_holds_is_what_was_put_into_it(dtype: torch.dtype) -> None:
    x, ids, shares = rows(4)
    message = routed(x.to(dtype), ids, shares)
    again = message.over(message.packed.clone())
    assert again.packed.shape == (4, HIDDEN * dtype.itemsize + 8 * TOP_K)
    assert torch.equal(again.x, x.to(dtype)) and torch.equal(again.slots.long(), ids)
    assert torch.equal(again.weights, shares)
