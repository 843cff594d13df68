"""Products with a fixed weight: stacked parts, with and without biases, packed or not, for any number of rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from worker.linear import make_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_parts_and_their_biases_are_stacked_along_the_output(dtype: torch.dtype, with_biases: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    parts = [torch.randn(size, 12, generator=generator).to(dtype) for size in (6, 2, 2)]
    biases = [torch.randn(len(part), generator=generator).to(dtype) for part in parts] if with_biases else []
    x = torch.randn(rows, 12, generator=generator).to(dtype)
    wanted = [F.linear(x, part, bias) for part, bias in itertools.zip_longest(parts, biases)]
    assert torch.allclose(make_linear(parts, biases=biases)(x), torch.cat(wanted, dim=1), atol=1e-5, rtol=1e-2)
