"""What only the FlashInfer backend has: which kernel takes which rows, its wrappers, and its limits."""

import gc
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from attention.flashinfer_kernel.backend import FlashInferAttentionBackend, FlashInferPlan
from attention.flashinfer_kernel.library import FlashInferLibrary, load_flashinfer
from attention.interface import AttentionSpec
from parallel.storage import Plane, PlaneView, lay_out_page
from tests.attention import flashinfer_double
from tests.attention.flashinfer_double import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from tests.attention.reference import make_case, make_spec


def make_backend(*, num_heads: int = 4) -> FlashInferAttentionBackend:
    return FlashInferAttentionBackend(make_spec(num_heads=num_heads), library=flashinfer_double, workspace_bytes=1024)


def plan(backend: FlashInferAttentionBackend, *entries: tuple[int, int, bool]) -> FlashInferPlan:
    case = make_case(make_spec(), entries)
    return backend.plan(case.tables, case.rows)


def test_single_rows_go_to_the_decode_kernel_and_stay_in_place() -> None:
    planned = plan(make_backend(), (1, 9, True), (1, 4, False))
    assert [type(part.wrapper) for part in planned.passes] == [BatchDecodeWithPagedKVCacheWrapper]
    assert planned.passes[0].order is None


def test_a_mixed_plan_takes_one_pass_for_each_kind_of_rows() -> None:
    planned = plan(make_backend(), (2, 9, True), (1, 4, True), (3, 2, False), (4, 4, True))
    decode, causal, full = (part.wrapper for part in planned.passes)
    assert isinstance(decode, BatchDecodeWithPagedKVCacheWrapper)
    assert isinstance(causal, BatchPrefillWithPagedKVCacheWrapper) and causal.planned is not None
    assert isinstance(full, BatchPrefillWithPagedKVCacheWrapper) and full.planned is not None
    assert causal.planned.causal and not full.planned.causal
    orders = [part.order.tolist() for part in planned.passes if part.order is not None]
    assert orders == [[2], [0, 1, 6, 7, 8, 9], [3, 4, 5]]


def test_rows_without_keys_reach_no_kernel() -> None:
    assert plan(make_backend(), (1, 0, False), (5, 0, False)).passes == []


def test_plans_in_flight_hold_different_wrappers_and_later_plans_take_them_over() -> None:
    backend = make_backend()
    plans = [plan(backend, (1, 9, True)) for _ in range(2)]
    held = {id(planned.passes[0].wrapper) for planned in plans}
    assert len(held) == 2
    plans.clear()
    gc.collect()
    again = [plan(backend, (1, 5, True)) for _ in range(2)]
    assert {id(planned.passes[0].wrapper) for planned in again} == held


@pytest.mark.parametrize(("num_heads", "expected"), [(2, False), (6, False), (8, True), (10, True)])
def test_tensor_cores_decode_larger_groups(num_heads: int, expected: bool) -> None:
    wrapper = plan(make_backend(num_heads=num_heads), (1, 9, True)).passes[0].wrapper
    assert isinstance(wrapper, BatchDecodeWithPagedKVCacheWrapper) and wrapper.use_tensor_cores is expected


def test_all_wrappers_share_one_workspace() -> None:
    workspaces = []

    def recording(workspace: torch.Tensor, kv_layout: str, *, use_tensor_cores: bool) -> object:
        workspaces.append(workspace.data_ptr())
        return BatchDecodeWithPagedKVCacheWrapper(workspace, kv_layout, use_tensor_cores=use_tensor_cores)

    library = SimpleNamespace(**(vars(flashinfer_double) | {"BatchDecodeWithPagedKVCacheWrapper": recording}))
    backend = FlashInferAttentionBackend(make_spec(), library=cast(FlashInferLibrary, library), workspace_bytes=1024)
    plans = [plan(backend, (1, 9, True)) for _ in range(3)]
    assert len(plans) == len(workspaces) == 3 and len(set(workspaces)) == 1


def test_a_spec_that_its_kernels_do_not_take_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"head sizes 64, 128, 256 in float16 or bfloat16, not 16 in bfloat16.*'torch'"
    ):
        load_flashinfer(make_spec(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"not 64 in float32"):
        load_flashinfer(make_spec(head_dim=64))
    with pytest.raises(ValueError, match=r"keys and values that are two planes alike, not .*latent.*'torch'"):
        load_flashinfer(wide_latent_spec())


def wide_latent_spec() -> AttentionSpec:
    """A latent of a head size that FlashInfer has, with the value inside it."""
    plane = Plane(name="latent", elements=128, per_head=False)
    return AttentionSpec(
        num_heads=4,
        page=lay_out_page([plane], page_size=4, num_heads=1, dtype="bfloat16"),
        key=PlaneView(plane="latent", offset=0, width=128),
        value=PlaneView(plane="latent", offset=0, width=64),
        device=torch.device("cpu"),
    )
