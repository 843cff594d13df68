"""Products with a fixed weight: stacked parts, with and without biases, packed or not, for any number of rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from worker.kernels.torch_kernels import TorchKernels, padded_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 40, 67])
def test_parts_and_their_biases_are_stacked_along_the_output(dtype: torch.dtype, with_biases: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    parts = [torch.randn(size, 12, generator=generator).to(dtype) for size in (6, 2, 2)]
    biases = [torch.randn(len(part), generator=generator).to(dtype) for part in parts] if with_biases else []
    x = torch.randn(rows, 12, generator=generator).to(dtype)
    wanted = [F.linear(x, part, bias) for part, bias in itertools.zip_longest(parts, biases)]
    assert torch.allclose(
        TorchKernels().linear(parts, biases=biases)(x), torch.cat(wanted, dim=1), atol=1e-5, rtol=1e-2
    )


def test_products_are_made_with_few_numbers_of_rows_none_of_them_much_too_large() -> None:
    sizes = {rows: padded_rows(rows) for rows in range(1, 4097)}
    for rows, size in sizes.items():
        assert size % 4 == 0 and rows <= size < rows + max(4, rows / 16)
        assert padded_rows(size) == size
    assert len(set(sizes.values())) < 128
    assert all(sizes[2**power] == 2**power for power in range(2, 13))
