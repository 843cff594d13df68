"""Draws in C++ against torch's, in each build that this processor can run."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from native.build import AVX2, NATIVE, Build
from native.library import NativeLibrary
from proto import control_pb2
from worker.kernels.interface import Draw
from worker.kernels.native_kernels import NativeKernels
from worker.kernels.torch_kernels import TorchKernels
from worker.kernels.torch_sampler import filter_logits

#: What may go either way, see Kernels.draw.
EDGE = 1e-6
SAMPLINGS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in product(
        (0.0, 0.7, 1.5), (0, 1, 40, 600, 100_000), (1.0, 0.9, 0.2), (0.0, 0.05)
    )
]


@pytest.fixture(scope="module", params=[NATIVE, AVX2])
def path(request: pytest.FixtureRequest) -> Path:
    """The library of one build."""
    if request.param == AVX2 and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    return Build(march=request.param).make()


@pytest.fixture
def kernels(path: Path) -> NativeKernels:
    return NativeKernels(NativeLibrary(path))


def draw(position: int = 0, **sampling: Any) -> Draw:
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 3, **sampling}
    return Draw(sampling=control_pb2.Sampling(**values), position=position)


def logits_row(seed: int, *, vocab_size: int, scale: float, sampling: control_pb2.Sampling) -> torch.Tensor:
    """Random logits [V] none of which lies at an edge of a filter."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        row = scale * torch.randn(vocab_size, generator=generator)
        if sampling.temperature == 0 or not has_edge(row, sampling):
            return row


def has_edge(row: torch.Tensor, sampling: control_pb2.Sampling) -> bool:
    """Whether a token of the logits [V] lies within EDGE of what top-p or min-p keeps."""
    by_top_k = control_pb2.Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=1)
    best = filter_logits(row[None], [by_top_k])[0].double().softmax(-1).sort(descending=True).values
    at_top_p = ((best.cumsum(-1) - best)[1:] - sampling.top_p).abs() < EDGE
    at_min_p = (best / best[0] - sampling.min_p).abs()[1:] < EDGE
    return bool((sampling.top_p < 1 and at_top_p.any()) or (sampling.min_p > 0 and at_min_p.any()))


def assert_agree(kernels: NativeKernels, logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    tokens, is_finite = kernels.draw(logits, draws)
    wanted, wanted_finite = TorchKernels().draw(logits, draws)
    assert (tokens.dtype, is_finite.dtype) == (wanted.dtype, wanted_finite.dtype)
    assert is_finite.tolist() == wanted_finite.tolist()
    assert tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
@pytest.mark.parametrize("num_rows", [1, 5, 33])
@pytest.mark.parametrize("vocab_size", [1, 7, 16, 1000])
def test_tokens_are_torch_s_whatever_filters_are_combined(
    kernels: NativeKernels, vocab_size: int, num_rows: int, scale: float
) -> None:
    draws = [draw(position=7 * at, seed=at, **sampling) for at, sampling in enumerate(SAMPLINGS)]
    rows = [logits_row(at, vocab_size=vocab_size, scale=scale, sampling=draw.sampling) for at, draw in enumerate(draws)]
    for first in range(0, len(draws), num_rows):
        chosen = slice(first, first + num_rows)
        assert_agree(kernels, torch.stack(rows[chosen]), draws[chosen])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_tokens_are_torch_s_in_a_vocabulary_of_a_real_model(kernels: NativeKernels, scale: float) -> None:
    draws = [draw(position=at, seed=at, **sampling) for at, sampling in enumerate(SAMPLINGS)]
    rows = [logits_row(at, vocab_size=49152, scale=scale, sampling=draw.sampling) for at, draw in enumerate(draws)]
    for first in range(0, len(draws), 33):
        chosen = slice(first, first + 33)
        assert_agree(kernels, torch.stack(rows[chosen]), draws[chosen])


def test_the_tokens_of_every_top_k_are_torch_s(kernels: NativeKernels) -> None:
    draws = [draw(position=top_k, top_k=top_k, temperature=2.0) for top_k in range(1, 1002)]
    logits = torch.randn(len(draws), 1000, generator=torch.Generator().manual_seed(1))
    assert_agree(kernels, logits, draws)


def test_no_rows_have_no_tokens(kernels: NativeKernels) -> None:
    for vocab_size in (1, 7, 49152):
        assert_agree(kernels, torch.empty(0, vocab_size), [])


@pytest.mark.parametrize("vocab_size", [1, 7, 16, 1000])
def test_of_equal_logits_those_that_torch_keeps_are_kept_and_the_first_one_wins(
    kernels: NativeKernels, vocab_size: int
) -> None:
    draws = [
        draw(seed=at, position=at, **{**sampling, "top_p": top_p})
        for at, (sampling, top_p) in enumerate(product(SAMPLINGS, (1.0, 0.7003)))
    ]
    generator = torch.Generator().manual_seed(vocab_size)
    for kinds in (1, 2, 6):
        logits = torch.randint(-1, kinds - 1, (len(draws), vocab_size), generator=generator).float()
        assert_agree(kernels, logits, draws)


@pytest.mark.parametrize("magnitude", [3.0, 1e3, 1e6, 1e7])
def test_of_results_that_rounding_makes_equal_the_first_one_wins(kernels: NativeKernels, magnitude: float) -> None:
    noise = torch.randn(300, 1000, generator=torch.Generator().manual_seed(1))
    draws = [draw(position=at) for at in range(len(noise))]
    for logits in (magnitude + noise, noise - magnitude):
        assert_agree(kernels, logits, draws)


def test_zeros_of_either_sign_are_equal(kernels: NativeKernels) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [-1.0, 0.0, -0.0, 0.0]])
    for top_k in (0, 1, 2):
        for temperature in (0.0, 1.0):
            assert_agree(kernels, logits, [draw(temperature=temperature, top_k=top_k)] * 2)


@pytest.mark.parametrize("values", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_a_row_that_holds_no_number_anywhere_gives_token_0_and_spoils_itself_alone(
    kernels: NativeKernels, values: list[float]
) -> None:
    vocab_size = 300
    clean = torch.randn(2 * vocab_size, vocab_size, generator=torch.Generator().manual_seed(1)) * 100
    draws = [draw(position=at, temperature=at % 3, top_k=at % 5, top_p=1 - at % 2 / 10) for at in range(len(clean))]
    spoiled = clean.clone()
    for place in range(vocab_size - len(values) + 1):
        spoiled[2 * place, place : place + len(values)] = torch.tensor(values)
    tokens, is_finite = kernels.draw(spoiled, draws)
    assert is_finite.tolist() == spoiled.isfinite().all(-1).tolist()
    assert (tokens[~is_finite] == 0).all()
    assert torch.equal(tokens[is_finite], kernels.draw(clean, draws)[0][is_finite])


def test_finite_logits_are_that_however_large_their_sum(kernels: NativeKernels) -> None:
    logits = torch.full((1, 40), 3e38)
    logits[0, 7] = 3.1e38
    for sampling in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
        tokens, is_finite = kernels.draw(logits, [draw(**sampling)])
        assert (tokens.tolist(), is_finite.tolist()) == ([7], [True])


def test_scores_that_overflow_are_the_best(kernels: NativeKernels) -> None:
    logits = torch.tensor([[1.0, -3e38, 2e38, 3e38]])
    for sampling in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert kernels.draw(logits, [draw(temperature=0.1, **sampling)])[0].tolist() == [2]


def test_rows_of_whatever_strides_are_taken(kernels: NativeKernels) -> None:
    wide = torch.randn(40, 60, generator=torch.Generator().manual_seed(1))
    for rows in (wide[:, 5:49], wide[::3, :17], wide.t(), wide[:1].expand(40, 60), wide[:, 1:2]):
        assert_agree(kernels, rows, [draw(position=at, top_k=at % 4) for at in range(len(rows))])


def test_a_row_s_token_depends_on_no_other_row_nor_on_the_number_of_threads(path: Path) -> None:
    logits = 2 * torch.randn(33, 1000, generator=torch.Generator().manual_seed(1))
    draws = [draw(position=at, **sampling) for at, sampling in enumerate(SAMPLINGS[-33:])]
    together = NativeKernels(NativeLibrary(path)).draw(logits, draws)[0].tolist()
    for threads in (1, 2, 3):
        kernels = NativeKernels(NativeLibrary(path, num_threads=threads))
        assert kernels.draw(logits, draws)[0].tolist() == together
        assert kernels.draw(logits.flip(0), draws[::-1])[0].tolist() == together[::-1]
        assert [int(kernels.draw(logits[at : at + 1], [draws[at]])[0]) for at in range(33)] == together


def test_large_seeds_and_positions_give_torch_s_noise(kernels: NativeKernels) -> None:
    draws = [draw(position=position, seed=seed) for position in (0, 1, 2**40) for seed in (0, 2**63, 2**64 - 1)]
    assert_agree(kernels, torch.zeros(len(draws), 5000), draws)


@pytest.mark.parametrize("repeats", [1, 64])
def test_draws_follow_the_softmax(kernels: NativeKernels, repeats: int) -> None:
    """Of four tokens, and of as many groups of tokens."""
    probabilities, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 4000
    logits = probabilities.log().repeat(repeats).expand(count, -1)
    tokens, _ = kernels.draw(logits, [draw(position=position, seed=position % 7) for position in range(count)])
    shares = torch.bincount(tokens % 4, minlength=4) / count
    assert (shares - probabilities).abs().max() < 0.03


def test_draws_among_the_tokens_of_top_p_follow_their_softmax(kernels: NativeKernels) -> None:
    probabilities, count = torch.tensor([0.04, 0.3, 0.5, 0.16]), 4000
    draws = [draw(position=position, top_p=0.75) for position in range(count)]
    tokens, _ = kernels.draw(probabilities.log().expand(count, 4), draws)
    shares = torch.bincount(tokens, minlength=4) / count
    assert shares[[0, 3]].tolist() == [0, 0]
    assert (shares - torch.tensor([0, 0.375, 0.625, 0])).abs().max() < 0.03


def test_logits_of_another_dtype_are_torch_s(kernels: NativeKernels) -> None:
    assert_agree(kernels, torch.randn(3, 50).bfloat16(), [draw(position=at) for at in range(3)])
