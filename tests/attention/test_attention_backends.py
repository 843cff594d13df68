"""Every backend gives what the definition gives: attention over pages, writing them, and merging parts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention.interface import AttentionRows, KvWrite, PageTables
from attention.torch_kernel.backend import TorchAttentionBackend
from parallel.storage import PageLayout
from tests.attention.reference import (
    Case,
    MakeBackend,
    latent_spec,
    make_case,
    make_layer,
    make_spec,
    page_of,
    positions_apart,
    reference,
)

TOLERANCE = 1e-5
CAUSAL, FULL = True, False


def assert_agrees(case: Case, make_backend: MakeBackend) -> None:
    plan = make_backend(case.spec).plan(case.tables, case.rows)
    expected, expected_lse = reference(case)
    output, lse = plan.run_with_lse(case.q, case.layer, lists=case.lists)
    assert output.dtype == case.spec.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(plan.run(case.q, case.layer, lists=case.lists), output, atol=TOLERANCE, rtol=TOLERANCE)


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


def test_the_scale_is_the_layers(make_backend: MakeBackend) -> None:
    assert_agrees(make_case(make_spec(), [(1, 10, CAUSAL), (12, 17, CAUSAL)], scale=0.7), make_backend)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("page_size", [4, 16])
def test_a_window_hides_what_lies_behind_it(make_backend: MakeBackend, window: int, page_size: int) -> None:
    entries = [(1, 9, CAUSAL), (1, 1, CAUSAL), (4, 4, CAUSAL), (3, 40, CAUSAL), (20, 20, CAUSAL), (12, 37, CAUSAL)]
    assert_agrees(make_case(make_spec(window=window, page_size=page_size), entries), make_backend)


def test_a_window_hides_nothing_of_rows_that_are_not_causal(make_backend: MakeBackend) -> None:
    entries = [(1, 9, FULL), (1, 9, CAUSAL), (12, 20, FULL), (3, 18, FULL), (12, 20, CAUSAL)]
    assert_agrees(make_case(make_spec(window=4), entries), make_backend)


def test_a_window_longer_than_a_block_of_queries_agrees_with_the_definition(make_backend: MakeBackend) -> None:
    spec = make_spec(num_heads=1, num_kv_heads=1, window=300, page_size=16)
    assert_agrees(make_case(spec, [(530, 700, CAUSAL)]), make_backend)


@pytest.mark.parametrize("window", [0, 5])
def test_strides_are_read_and_not_assumed(make_backend: MakeBackend, window: int) -> None:
    spec = make_spec(window=window, lay_out=positions_apart)
    assert_agrees(make_case(spec, [(1, 10, CAUSAL), (12, 17, CAUSAL), (3, 8, CAUSAL)]), make_backend)


@pytest.mark.parametrize("lay_out", [lambda page: page, positions_apart], ids=["as laid out", "odd strides"])
@pytest.mark.parametrize("window", [0, 3, 9])
def test_a_value_may_lie_inside_a_key_that_heads_share(
    window: int, lay_out: Callable[[PageLayout], PageLayout]
) -> None:
    spec = latent_spec(window=window, lay_out=lay_out)
    assert_agrees(make_case(spec, [(1, 10, CAUSAL), (12, 17, CAUSAL), (3, 8, CAUSAL)]), TorchAttentionBackend)


@pytest.mark.parametrize("lay_out", [lambda page: page, positions_apart], ids=["as laid out", "odd strides"])
def test_each_row_may_see_a_list_of_positions(lay_out: Callable[[PageLayout], PageLayout]) -> None:
    case = make_case(latent_spec(listed=6, lay_out=lay_out), [(1, 10, CAUSAL), (12, 17, CAUSAL), (3, 8, CAUSAL)])
    lists = torch.full((len(case.q), 6), -1, dtype=torch.int32)
    for row, kv_len in enumerate(np.repeat(case.rows.kv_len, case.rows.num_rows).tolist()):
        count = row % 7  # none for some, as many as there is room for others
        lists[row, :count] = torch.randperm(kv_len, generator=torch.Generator().manual_seed(row))[:count].int()
    assert_agrees(replace(case, lists=lists), TorchAttentionBackend)


def test_rows_without_keys_give_zeros_and_minus_infinity(make_backend: MakeBackend) -> None:
    entries = [(1, 0, FULL), (1, 5, CAUSAL), (12, 0, FULL), (10, 12, CAUSAL), (1, 0, FULL)]
    assert_agrees(make_case(make_spec(), entries), make_backend)
    assert_agrees(make_case(make_spec(), [(2, 0, FULL)]), make_backend)


@pytest.mark.parametrize("entries", [[], [(0, 0, CAUSAL)], [(0, 6, CAUSAL), (0, 0, FULL)]])
def test_a_plan_may_have_no_rows(make_backend: MakeBackend, entries: Sequence[tuple[int, int, bool]]) -> None:
    case = make_case(make_spec(), entries)
    output, lse = make_backend(case.spec).plan(case.tables, case.rows).run_with_lse(case.q, case.layer)
    assert output.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_what_lies_behind_the_last_position_does_not_matter(make_backend: MakeBackend) -> None:
    case = make_case(make_spec(page_size=16), [(1, 5, CAUSAL), (1, 18, CAUSAL), (10, 21, CAUSAL)])
    plan = make_backend(case.spec).plan(case.tables, case.rows)
    before = plan.run(case.q, case.layer)
    for entry, kv_len in enumerate(case.rows.kv_len.tolist()):
        page = page_of(case, entry, kv_len - 1)
        case.layer.key[page, :, kv_len % 16 :] = torch.nan
        case.layer.value[page, :, kv_len % 16 :] = 1e3
    torch.testing.assert_close(plan.run(case.q, case.layer), before, atol=0, rtol=0)


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
    before = backend.plan(case.tables, case.rows).run(case.q, case.layer)
    num_rows, kv_len, causal = entry
    for position in {max(kv_len - 1 - ahead, 0) for ahead in (0, num_rows // 2, num_rows)}:
        layer = case.layer.over(case.layer.pages.clone())
        where = write_at([(page_of(case, 1, position), position % 16)])
        k, v = (view[where.pages.long(), :, where.offsets.long()] for view in (layer.key, layer.value))
        (k, v)[which][0, 0, 2] = broken
        backend.write(layer, (k, v), where)
        after = backend.plan(case.tables, case.rows).run(case.q, layer)
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
    plans = [backend.plan(case.tables, case.rows) for case in cases]
    for case, plan in [*zip(cases, plans, strict=True), (cases[0], plans[0])]:
        expected, _ = reference(case)
        torch.testing.assert_close(plan.run(case.q, case.layer).double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_query_may_be_a_slice_of_a_fused_projection(make_backend: MakeBackend) -> None:
    case = make_case(make_spec(), [(1, 9, CAUSAL), (10, 12, CAUSAL), (2, 4, CAUSAL)])
    fused = torch.cat((torch.zeros_like(case.q), case.q), dim=1)
    assert_agrees(replace(case, q=fused[:, case.spec.num_heads :]), make_backend)


def test_rows_that_contradict_themselves_are_refused_with_their_numbers(make_backend: MakeBackend) -> None:
    backend = make_backend(make_spec(page_size=4))
    tables = PageTables.from_host(np.zeros((2, 3), dtype=np.int32), device=torch.device("cpu"))

    def rows(*kv_lens: int, first_page: int = 0, num_rows: int = 1) -> AttentionRows:
        return AttentionRows(
            table_row=np.arange(len(kv_lens)),
            first_page=np.full(len(kv_lens), first_page),
            num_rows=np.full(len(kv_lens), num_rows),
            kv_len=np.array(kv_lens),
            causal=np.ones(len(kv_lens), dtype=np.bool_),
        )

    with pytest.raises(ValueError, match=r"rows\[0\]: kv_len 9 .* takes 3 pages of row 0 from column 1 on.* are 2 x 3"):
        backend.plan(tables, rows(9, first_page=1))
    with pytest.raises(ValueError, match=r"rows\[2\]: kv_len 3 at page size 4 takes 1 pages of row 2 .* are 2 x 3"):
        backend.plan(tables, rows(3, 3, 3))
    with pytest.raises(ValueError, match=r"rows\[1\]: 5 causal rows .* kv_len is 4"):
        backend.plan(tables, rows(6, 4, num_rows=5))
    with pytest.raises(ValueError, match=r"rows\[0\]: num_rows -1 and kv_len 4 must not be negative"):
        backend.plan(tables, rows(4, num_rows=-1))


@pytest.mark.parametrize("lay_out", [lambda page: page, positions_apart], ids=["as laid out", "odd strides"])
@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_what_is_written_is_read_back_and_nothing_else_changes(
    make_backend: MakeBackend, num_tokens: int, lay_out: Callable[[PageLayout], PageLayout]
) -> None:
    spec = make_spec(page_size=4, lay_out=lay_out)
    layer = make_layer(spec, num_pages=9, generator=torch.Generator().manual_seed(0))
    slots = torch.randperm(36)[:num_tokens].tolist()
    k, v = torch.randn(2, num_tokens, spec.num_kv_heads, 16)
    expected = layer.over(layer.pages.clone())
    for row, slot in enumerate(slots):
        expected.key[slot // 4, :, slot % 4] = k[row]
        expected.value[slot // 4, :, slot % 4] = v[row]
    make_backend(spec).write(layer, (k, v), write_at([divmod(slot, 4) for slot in slots]))
    assert torch.equal(layer.pages, expected.pages)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("element", [3, 20])
def test_a_value_inside_a_broken_key_is_finite_and_the_rest_of_the_key_tells(element: int, broken: float) -> None:
    spec = latent_spec(lay_out=lambda page: page)
    layer = make_layer(spec, num_pages=2, generator=torch.Generator().manual_seed(0))
    row = torch.randn(1, 1, 24)
    row[0, 0, element] = broken
    TorchAttentionBackend(spec).write(layer, (row,), write_at([(1, 2)]))
    assert torch.equal(layer.value[1, 0, 2], torch.zeros(16)) and layer.key[1, 0, 2, 16:].isnan().all()


def write_at(places: Sequence[tuple[int, int]]) -> KvWrite:
    """Rows to (page, offset)."""
    numbers = torch.tensor(places, dtype=torch.int32).view(-1, 2)
    return KvWrite(pages=numbers[:, 0].contiguous(), offsets=numbers[:, 1].contiguous())


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_merged_parts_of_the_kv_equal_the_whole(make_backend: MakeBackend, num_parts: int) -> None:
    whole = make_case(make_spec(), [(1, 19, FULL), (11, 32, FULL), (1, 2, FULL)])
    backend = make_backend(whole.spec)
    plans = [backend.plan(*owned(whole, owner=owner, num_parts=num_parts)) for owner in range(num_parts)]
    states = [plan.run_with_lse(whole.q, whole.layer) for plan in plans]
    output, lse = backend.merge(
        torch.stack([state[0] for state in states]), torch.stack([state[1] for state in states])
    )
    expected, expected_lse = reference(whole)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)


def owned(case: Case, *, owner: int, num_parts: int) -> tuple[PageTables, AttentionRows]:
    """Each entry's pages dealt to `num_parts` owners in turn, each owner's in order of position; some get none."""
    size, host = case.spec.page_size, np.zeros_like(case.tables.host)
    kv_len = np.zeros_like(case.rows.kv_len)
    for entry, length in enumerate(case.rows.kv_len.tolist()):
        pages = range(owner, -(-length // size), num_parts)
        host[entry, : len(pages)] = [page_of(case, entry, page * size) for page in pages]
        kv_len[entry] = sum(min(size, length - page * size) for page in pages)
    rows = AttentionRows(
        table_row=np.arange(len(kv_len)),
        first_page=np.zeros_like(kv_len),
        num_rows=case.rows.num_rows,
        kv_len=kv_len,
        causal=np.zeros(len(kv_len), dtype=np.bool_),
    )
    return PageTables.from_host(host, device=case.spec.device), rows


def test_merging_two_empty_parts_gives_zeros_and_minus_infinity(make_backend: MakeBackend) -> None:
    output, lse = make_backend(make_spec()).merge(torch.zeros(2, 3, 4, 16), torch.full((2, 3, 4), -torch.inf))
    assert torch.equal(output, torch.zeros(3, 4, 16)) and torch.equal(lse, torch.full((3, 4), -torch.inf))


def test_merging_no_rows_gives_no_rows(make_backend: MakeBackend) -> None:
    output, lse = make_backend(make_spec()).merge(torch.zeros(2, 0, 4, 16), torch.zeros(2, 0, 4))
    assert output.shape == (0, 4, 16) and lse.shape == (0, 4)
