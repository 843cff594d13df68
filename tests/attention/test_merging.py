"""Merging by log-sum-exp: the order and the grouping of parts do not matter, and empty parts count nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.merging import merge_pair, merge_partials

LSE = st.one_of(st.just(-torch.inf), st.floats(-80, 80, width=32))
LSES = st.integers(1, 4).flatmap(
    lambda num_rows: st.lists(st.lists(LSE, min_size=num_rows, max_size=num_rows), min_size=1, max_size=6)
)


def make_parts(lses: list[list[float]], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [S, T, 1, 3] and log-sum-exps [S, T, 1] in float64; a part that saw nothing has zeros."""
    lse = torch.tensor(lses, dtype=torch.float64).unsqueeze(-1)
    outputs = torch.randn(*lse.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.where(lse.isneginf().unsqueeze(-1), 0.0, outputs), lse


@given(lses=LSES)
def test_a_merge_is_the_mean_weighted_by_exponentials(lses: list[list[float]]) -> None:
    outputs, lse = make_parts(lses)
    merged, merged_lse = merge_partials(outputs, lse)
    weights = lse.exp()
    expected = (outputs * weights.unsqueeze(-1)).sum(0) / weights.sum(0).clamp_min(1e-300).unsqueeze(-1)
    assert not merged.isnan().any() and not merged_lse.isnan().any()
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(merged_lse, weights.sum(0).log())


@given(lses=LSES, cut=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_merging_in_any_grouping_and_order_gives_the_same(lses: list[list[float]], cut: int, order: object) -> None:
    outputs, lse = make_parts(lses)
    whole = merge_partials(outputs, lse)
    shuffled = list(range(len(lses)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    head, tail = shuffled[: cut + 1], shuffled[cut + 1 :]
    states = [merge_partials(outputs[part], lse[part]) for part in (head, tail) if part]
    regrouped = merge_partials(torch.stack([state[0] for state in states]), torch.stack([state[1] for state in states]))
    torch.testing.assert_close(regrouped, whole)


@given(lses=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=2, max_size=2))
def test_the_pair_merge_is_the_merge_of_two(lses: list[list[float]]) -> None:
    outputs, lse = make_parts(lses)
    torch.testing.assert_close(merge_pair((outputs[0], lse[0]), (outputs[1], lse[1])), merge_partials(outputs, lse))


@given(lses=LSES)
def test_a_merge_in_float32_has_no_nan_at_any_distance(lses: list[list[float]]) -> None:
    outputs, lse = make_parts([[value * 1e30 for value in row] for row in lses])
    merged, merged_lse = merge_partials(outputs.float(), lse.float())
    assert merged.isfinite().all() and not merged_lse.isnan().any()


def test_a_merge_keeps_the_dtype_of_its_outputs() -> None:
    outputs, lse = make_parts([[0.0], [1.0]])
    merged, merged_lse = merge_partials(outputs.bfloat16(), lse.float())
    assert merged.dtype == torch.bfloat16 and merged_lse.dtype == torch.float32
