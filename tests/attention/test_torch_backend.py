"""What only the torch backend has: its squares, its padded batches, its dtypes and its memory."""

from dataclasses import replace

import pytest
import torch

from attention.torch_kernel import block_rows
from attention.torch_kernel.backend import TorchAttentionBackend
from attention.torch_kernel.row_parts import MAX_SHORT_ROWS
from tests.attention.reference import Case, make_case, make_spec, reference


def assert_agrees(case: Case, *, tolerance: float = 1e-5) -> None:
    output, lse = TorchAttentionBackend(case.spec).plan(case.tables, case.rows).run_with_lse(case.q, case.layer)
    expected, expected_lse = reference(case)
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("earlier", [0, 37])
def test_a_prompt_longer_than_a_square_agrees_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, earlier: int
) -> None:
    monkeypatch.setattr(block_rows, "QUERY_BLOCK", 16)
    assert_agrees(make_case(make_spec(), [(41, 41 + earlier, True), (20, 20 + earlier, False)]))


def test_sequences_of_very_different_lengths_agree_across_their_batches() -> None:
    spec = make_spec(num_heads=8, num_kv_heads=8, head_dim=128, page_size=16)
    case = make_case(spec, [(1, kv_len, True) for kv_len in (3, 290, 17, 250, 1, 120, 600)] + [(2, 9, False)])
    short = TorchAttentionBackend(spec).plan(case.tables, case.rows).short_rows
    assert short is not None and len(short.batches) > 3
    assert_agrees(case)


def test_equal_lengths_take_no_mask_and_no_reordering() -> None:
    spec = make_spec()
    case = make_case(spec, [(1, 9, True)] * 3)
    short = TorchAttentionBackend(spec).plan(case.tables, case.rows).short_rows
    assert short is not None and short.order is None
    assert [batch.mask for batch in short.batches] == [None]


def test_rows_up_to_the_limit_of_short_entries_are_batched_and_longer_ones_are_not() -> None:
    spec = make_spec()
    case = make_case(spec, [(MAX_SHORT_ROWS, 9, True), (MAX_SHORT_ROWS + 1, 9, True)])
    plan = TorchAttentionBackend(spec).plan(case.tables, case.rows)
    assert plan.short_rows is not None and len(plan.short_rows.batches) == len(plan.blocks) == 1


def test_low_precision_memory_is_computed_in_float32() -> None:
    case = make_case(make_spec(dtype="bfloat16"), [(1, 9, True), (1, 30, True), (12, 30, True)])
    low = replace(case, q=case.q.bfloat16())
    output, lse = TorchAttentionBackend(low.spec).plan(low.tables, low.rows).run_with_lse(low.q, low.layer)
    expected, expected_lse = reference(low)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_a_backend_first_used_in_inference_mode_still_works_outside() -> None:
    case = make_case(make_spec(), [(1, 9, True), (12, 30, True)])
    backend = TorchAttentionBackend(case.spec)
    with torch.inference_mode():
        inside = backend.plan(case.tables, case.rows).run(case.q, case.layer)
    assert torch.equal(backend.plan(case.tables, case.rows).run(case.q, case.layer), inside)
