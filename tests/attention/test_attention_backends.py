"""Every backend gives what the definition gives: attention over pages, writing them, and merging parts."""

from collections.abc import Sequence

import pytest
import torch

from attention.interface import AttentionRows, KvWrite
from tests.attention.reference import Case, MakeBackend, make_case, make_spec, reference

TOLERANCE = 1e-5
CAUSAL, FULL = True, False


def assert_agrees(case: Case, make_backend: MakeBackend) -> None:
    plan = make_backend(case.spec).plan(case.rows)
    expected, expected_lse = reference(case)
    output, lse = plan.run_with_lse(case.q, case.kv)
    assert output.dtype == case.spec.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(plan.run(case.q, case.kv), output, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("kv_lens", [[7], [16, 16, 16], [1, 33, 5, 64, 2]])
def test_decode_rows_of_mixed_lengths_agree_with_the_definition(
    make_backend: MakeBackend, page_size: int, kv_lens: list[int]
) -> None:
    spec = make_spec(page_size=page_size)
    assert_agrees(make_case(spec, [(1, kv_len, CAUSAL) for kv_len in kv_lens]), make_backend)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(("num_rows", "kv_len"), [(20, 20), (20, 37), (9, 64), (3, 3), (5, 21), (8, 48)])
def test_prompt_blocks_with_and_without_earlier_keys_agree_with_the_definition(
    make_backend: MakeBackend, page_size: int, num_rows: int, kv_len: int
) -> None:
    assert_agrees(make_case(make_spec(page_size=page_size), [(num_rows, kv_len, CAUSAL)]), make_backend)


@pytest.mark.parametrize("num_rows", [1, 4, 12])
def test_rows_that_are_not_causal_see_everything(make_backend: MakeBackend, num_rows: int) -> None:
    assert_agrees(make_case(make_spec(), [(num_rows, 18, FULL), (num_rows, 3, FULL)]), make_backend)


def test_one_plan_mixes_decode_prompts_and_passes_that_are_not_causal(make_backend: MakeBackend) -> None:
    entries = [
        (1, 9, CAUSAL),
        (14, 30, CAUSAL),
        (1, 40, FULL),
        (3, 11, CAUSAL),
        (13, 6, FULL),
        (0, 8, CAUSAL),
        (1, 2, CAUSAL),
        (3, 12, FULL),
        (10, 10, CAUSAL),
    ]
    assert_agrees(make_case(make_spec(), entries), make_backend)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (9, 3), (4, 1), (8, 2)])
def test_query_heads_share_the_kv_head_of_their_group(
    make_backend: MakeBackend, num_heads: int, num_kv_heads: int
) -> None:
    spec = make_spec(num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert_agrees(make_case(spec, [(1, 13, CAUSAL), (11, 21, CAUSAL), (1, 6, CAUSAL), (2, 9, CAUSAL)]), make_backend)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
def test_every_head_size_agrees_with_the_definition(make_backend: MakeBackend, head_dim: int) -> None:
    spec = make_spec(head_dim=head_dim)
    assert_agrees(make_case(spec, [(1, 10, CAUSAL), (12, 17, CAUSAL)]), make_backend)


def test_the_scale_is_the_one_of_the_spec(make_backend: MakeBackend) -> None:
    assert_agrees(make_case(make_spec(scale=0.7), [(1, 10, CAUSAL), (12, 17, CAUSAL)]), make_backend)


def test_rows_without_keys_give_zeros_and_minus_infinity(make_backend: MakeBackend) -> None:
    entries = [(1, 0, FULL), (1, 5, CAUSAL), (12, 0, FULL), (10, 12, CAUSAL), (1, 0, FULL)]
    assert_agrees(make_case(make_spec(), entries), make_backend)
    assert_agrees(make_case(make_spec(), [(2, 0, FULL)]), make_backend)


@pytest.mark.parametrize("entries", [[], [(0, 0, CAUSAL)], [(0, 6, CAUSAL), (0, 0, FULL)]])
def test_a_plan_may_have_no_rows(make_backend: MakeBackend, entries: Sequence[tuple[int, int, bool]]) -> None:
    case = make_case(make_spec(), entries)
    output, lse = make_backend(case.spec).plan(case.rows).run_with_lse(case.q, case.kv)
    assert output.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_what_lies_behind_the_last_position_does_not_matter(make_backend: MakeBackend) -> None:
    case = make_case(make_spec(page_size=16), [(1, 5, CAUSAL), (1, 18, CAUSAL), (10, 21, CAUSAL)])
    plan = make_backend(case.spec).plan(case.rows)
    before = plan.run(case.q, case.kv)
    for entry in case.rows:
        case.kv[entry.page_table[-1], 0, :, entry.kv_len % 16 :] = torch.nan
        case.kv[entry.page_table[-1], 1, :, entry.kv_len % 16 :] = 1e3
    torch.testing.assert_close(plan.run(case.q, case.kv), before, atol=0, rtol=0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "entry",
    [
        (1, 9, CAUSAL),
        (5, 21, CAUSAL),
        (40, 64, CAUSAL),
        (300, 310, CAUSAL),
        (12, 33, FULL),
        (40, 41, CAUSAL),
        (12, 1, FULL),
    ],
)
def test_a_row_that_holds_no_numbers_is_seen_by_those_that_see_it_and_changes_no_other(
    make_backend: MakeBackend, entry: tuple[int, int, bool], which: int, broken: float
) -> None:
    """Beside it in the plan are shorter sequences, whose rows are padded by what lies behind them."""
    spec = make_spec(page_size=16)
    case = make_case(spec, [(1, 3, CAUSAL), entry, (2, 40, CAUSAL), (30, 35, CAUSAL)])
    backend = make_backend(spec)
    before = backend.plan(case.rows).run(case.q, case.kv)
    num_rows, kv_len, causal = entry
    for position in {max(kv_len - 1 - ahead, 0) for ahead in (0, num_rows // 2, num_rows)}:
        kv = case.kv.clone()
        where = KvWrite(
            pages=torch.tensor([case.rows[1].page_table[position // 16]]), offsets=torch.tensor([position % 16])
        )
        k, v = (kv[where.pages, part, :, where.offsets] for part in (0, 1))
        (k, v)[which][0, 0, 2] = broken
        backend.write(kv, k, v, where)
        after = backend.plan(case.rows).run(case.q, kv)
        first = 1 + (max(position - (kv_len - num_rows), 0) if causal else 0)
        group = spec.num_heads // spec.num_kv_heads
        sees = torch.zeros(after.shape[:2], dtype=torch.bool)
        sees[first : 1 + num_rows, :group] = True
        assert not torch.isfinite(after[sees]).any()
        torch.testing.assert_close(after[~sees], before[~sees], atol=TOLERANCE, rtol=TOLERANCE)


def test_plans_do_not_disturb_each_other(make_backend: MakeBackend) -> None:
    backend = make_backend(make_spec())
    cases = [
        make_case(make_spec(), [(1, 9, CAUSAL), (10, 12, CAUSAL)], seed=1),
        make_case(make_spec(), [(1, 40, CAUSAL), (12, 33, CAUSAL), (9, 4, FULL)], seed=2),
    ]
    plans = [backend.plan(case.rows) for case in cases]
    for case, plan in [*zip(cases, plans, strict=True), (cases[0], plans[0])]:
        expected, _ = reference(case)
        torch.testing.assert_close(plan.run(case.q, case.kv).double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_query_may_be_a_slice_of_a_fused_projection(make_backend: MakeBackend) -> None:
    case = make_case(make_spec(), [(1, 9, CAUSAL), (10, 12, CAUSAL), (2, 4, CAUSAL)])
    fused = torch.cat((torch.zeros_like(case.q), case.q), dim=1)
    sliced = Case(spec=case.spec, rows=case.rows, q=fused[:, case.spec.num_heads :], kv=case.kv)
    assert_agrees(sliced, make_backend)


def test_rows_that_contradict_themselves_are_refused_with_their_numbers(make_backend: MakeBackend) -> None:
    backend = make_backend(make_spec(page_size=4))
    with pytest.raises(ValueError, match=r"rows\[0\]: kv_len 9 at page size 4 takes 3 pages, but page_table lists 2"):
        backend.plan([AttentionRows(num_rows=1, kv_len=9, page_table=[0, 1])])
    with pytest.raises(ValueError, match=r"rows\[1\]: 5 causal rows .* kv_len is 4"):
        backend.plan(
            [
                AttentionRows(num_rows=1, kv_len=4, page_table=[0]),
                AttentionRows(num_rows=5, kv_len=4, page_table=[0]),
            ]
        )


@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_what_is_written_is_read_back_and_nothing_else_changes(make_backend: MakeBackend, num_tokens: int) -> None:
    spec = make_spec(page_size=4)
    kv = torch.randn(9, 2, spec.num_kv_heads, 4, spec.head_dim)
    slots = torch.randperm(36)[:num_tokens]
    where = KvWrite(pages=slots // 4, offsets=slots % 4)
    k, v = torch.randn(2, num_tokens, spec.num_kv_heads, spec.head_dim)
    expected = kv.clone()
    for row, slot in enumerate(slots.tolist()):
        expected[slot // 4, 0, :, slot % 4] = k[row]
        expected[slot // 4, 1, :, slot % 4] = v[row]
    make_backend(spec).write(kv, k, v, where)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_merged_parts_of_the_kv_equal_the_whole(make_backend: MakeBackend, num_parts: int) -> None:
    whole = make_case(make_spec(), [(1, 19, FULL), (11, 32, FULL), (1, 2, FULL)])
    backend = make_backend(whole.spec)
    plans = [backend.plan(part) for part in partition(whole.rows, num_parts=num_parts, page_size=4)]
    states = [plan.run_with_lse(whole.q, whole.kv) for plan in plans]
    output, lse = backend.merge(
        torch.stack([state[0] for state in states]), torch.stack([state[1] for state in states])
    )
    expected, expected_lse = reference(whole)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)


def partition(rows: Sequence[AttentionRows], *, num_parts: int, page_size: int) -> list[list[AttentionRows]]:
    """Deals each table's pages to `num_parts` owners in turn, each owner's in order of position; some get none."""
    return [[_owned(entry, owner, num_parts, page_size) for entry in rows] for owner in range(num_parts)]


def _owned(entry: AttentionRows, owner: int, num_parts: int, page_size: int) -> AttentionRows:
    pages = range(owner, len(entry.page_table), num_parts)
    return AttentionRows(
        num_rows=entry.num_rows,
        kv_len=sum(min(page_size, entry.kv_len - page * page_size) for page in pages),
        page_table=[entry.page_table[page] for page in pages],
        causal=False,
    )


def test_merging_two_empty_parts_gives_zeros_and_minus_infinity(make_backend: MakeBackend) -> None:
    output, lse = make_backend(make_spec()).merge(torch.zeros(2, 3, 4, 16), torch.full((2, 3, 4), -torch.inf))
    assert torch.equal(output, torch.zeros(3, 4, 16)) and torch.equal(lse, torch.full((3, 4), -torch.inf))


def test_merging_no_rows_gives_no_rows(make_backend: MakeBackend) -> None:
    output, lse = make_backend(make_spec()).merge(torch.zeros(2, 0, 4, 16), torch.zeros(2, 0, 4))
    assert output.shape == (0, 4, 16) and lse.shape == (0, 4)
