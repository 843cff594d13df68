"""Draws: filters keep what they should, noise is a function of seed, position and token, and it follows the softmax."""

from typing import Any

import pytest
import torch

from proto import control_pb2
from worker.kernels.interface import Draw
from worker.kernels.torch_sampler import are_finite, draw_tokens, filter_logits, gumbel_noise

CPU = torch.device("cpu")


def draw(position: int = 0, **sampling: Any) -> Draw:
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 3, **sampling}
    return Draw(sampling=control_pb2.Sampling(**values), position=position)


def kept(logits: list[float], **sampling: Any) -> list[int]:
    filtered = filter_logits(torch.tensor([logits]), [draw(**sampling).sampling])
    return filtered.isfinite()[0].nonzero().flatten().tolist()


def test_temperature_zero_is_the_argmax_beside_rows_that_sample() -> None:
    logits = torch.randn(3, 50)
    tokens = draw_tokens(logits, [draw(temperature=0), draw(), draw(temperature=0)])
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.75}, [1, 3]),
        ({"top_p": 1e-6}, [3]),
        ({"min_p": 0.3}, [1, 3]),
        ({"min_p": 1.0}, [3]),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.2}, [1, 3]),
    ],
)
def test_filters_keep_the_fewest_tokens_that_they_should(sampling: dict[str, Any], expected: list[int]) -> None:
    # Probabilities 0.04, 0.26, 0.1, 0.6 or close to it.
    logits = torch.tensor([0.04, 0.26, 0.1, 0.6]).log().tolist()
    assert kept(logits, **sampling) == expected


def test_filters_of_one_row_leave_the_others_alone() -> None:
    logits = torch.randn(2, 20)
    samplings = [draw(top_k=1).sampling, draw(top_k=0).sampling]
    assert filter_logits(logits, samplings).isfinite().sum(-1).tolist() == [1, 20]


def test_noise_depends_on_seed_position_and_token_only() -> None:
    alone = gumbel_noise([draw(position=5, seed=9)], vocab_size=100, device=CPU)
    batch = gumbel_noise([draw(seed=1), draw(position=5, seed=9)], vocab_size=100, device=CPU)
    assert torch.equal(alone[0], batch[1])
    wider = gumbel_noise([draw(position=5, seed=9)], vocab_size=300, device=CPU)
    assert torch.equal(alone[0], wider[0, :100])
    for other in (draw(position=6, seed=9), draw(position=5, seed=10)):
        assert not torch.equal(alone, gumbel_noise([other], vocab_size=100, device=CPU))


def test_large_seeds_are_told_apart() -> None:
    top = 2**64 - 1
    noise = [gumbel_noise([draw(seed=seed)], vocab_size=10, device=CPU) for seed in (top, top - 1, 2**63)]
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[1], noise[2])


def test_draws_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 4000
    draws = [draw(position=position, seed=position % 7) for position in range(count)]
    tokens = draw_tokens(probabilities.log().expand(count, 4), draws)
    shares = torch.bincount(tokens, minlength=4) / count
    assert (shares - probabilities).abs().max() < 0.03


def test_rows_that_hold_nan_or_infinity_anywhere_are_told_from_those_that_do_not() -> None:
    logits = torch.randn(9, 1000) * 100
    for row, values in enumerate(([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]), 1):
        logits[2 * row, 7 * row : 7 * row + len(values)] = torch.tensor(values)
    assert are_finite(logits).tolist() == [row % 2 == 1 or row == 0 for row in range(9)]
    assert are_finite(torch.empty(0, 5)).tolist() == []
