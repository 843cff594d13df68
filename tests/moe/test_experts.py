"""The experts of a rank against the definition, and the dispatcher's rows against what was sent."""

import contextlib

import torch
import torch.nn.functional as F

from moe.activation import Gated
from moe.dispatch import NO_SLOT
from moe.experts import TorchExperts
from moe.gate import choose_experts
from moe.gather_dispatch import GatherDispatcher
from parallel.collectives.communicator import LocalCommunicator
from parallel.models.gates import SWIGLU, GateSpec, Scoring
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
    return experts.run(x, ids, shares)


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


def test_dispatch_brings_every_row_with_its_own_experts_and_weights() -> None:
    x, ids, shares = rows(3)
    y, other_ids, other_shares = rows(5, seed=2)
    messages: list[torch.Tensor] = []

    class Recorder(TwoRanks):
        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            messages.append(x)
            return super().all_gather(x)

    other = GatherDispatcher(Recorder(1, other=torch.empty(0)))
    with contextlib.suppress(RuntimeError):  # only its message is wanted here
        other.dispatch(y, other_ids, other_shares, padded_rows=5)
    got = GatherDispatcher(TwoRanks(0, other=messages[0])).dispatch(x, ids, shares, padded_rows=5)
    assert torch.equal(got.x[:3], x) and torch.equal(got.x[5:], y)
    assert torch.equal(got.slots[:3], ids) and torch.equal(got.slots[5:], other_ids)
    assert torch.equal(got.weights[:3], shares) and torch.equal(got.weights[5:], other_shares)
    assert (got.slots[3:5] == NO_SLOT).all()
