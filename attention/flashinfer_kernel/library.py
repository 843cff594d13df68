"""The part of FlashInfer that the backend calls, as types, and the one place that imports it.

Signatures and meanings are those of flashinfer 0.7.2. Log-sum-exps are in base 2, causal masks are aligned to the
bottom right, `indptr` are offsets [B + 1] and `last_page_len` [B] counts the positions of each last page, all int32.
"""

import importlib
from collections.abc import Callable
from typing import Protocol, cast

import torch

from attention.interface import AttentionSpec

HEAD_DIMS = (64, 128, 256)
"""Head sizes that all its kernels in use here, appending and merging included, are instantiated for."""
DTYPES = (torch.float16, torch.bfloat16)


#: Each [N, Hkv, P, D], with the same strides.
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class PagedRun(Protocol):
    """A wrapper that was planned."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: KeysAndValues, *, q_scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, Hq, D] gives [T, Hq, D] and, with return_lse, [T, Hq]. Scores are multiplied by q_scale too."""
        ...


class PagedDecode(PagedRun, Protocol):
    """`BatchDecodeWithPagedKVCacheWrapper`: one query row of each sequence."""

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        """Plans one step; offsets lie on the host, indices anywhere, and what the kernel needs of them is copied. A row
        sees itself and `window_left` keys before it, all where that is -1.
        """
        ...


class PagedPrefill(PagedRun, Protocol):
    """`BatchPrefillWithPagedKVCacheWrapper`: several query rows of each sequence."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        window_left: int,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """Plans one step; offsets lie on the host, indices anywhere, and what the kernel needs of them is copied. A row
        sees itself and `window_left` keys before it, all where that is -1.
        """
        ...


class FlashInferLibrary(Protocol):
    """The module itself. A double of it takes its place where there is no GPU."""

    @property
    def BatchDecodeWithPagedKVCacheWrapper(self) -> Callable[..., PagedDecode]:
        """(float_workspace_buffer, kv_layout, *, use_tensor_cores)."""
        ...

    @property
    def BatchPrefillWithPagedKVCacheWrapper(self) -> Callable[..., PagedPrefill]:
        """(float_workspace_buffer, kv_layout)."""
        ...

    def append_paged_kv_cache(
        self,
        append_key: torch.Tensor,
        append_value: torch.Tensor,
        batch_indices: torch.Tensor,
        positions: torch.Tensor,
        paged_kv_cache: KeysAndValues,
        kv_indices: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        kv_layout: str,
    ) -> None:
        """Writes row i of key and value [T, Hkv, D] to position positions[i] of sequence batch_indices[i]."""
        ...

    def merge_states(self, v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merges v [T, S, Hq, D] and s [T, S, Hq] into [T, Hq, D] and [T, Hq]; S is at least 1."""
        ...


def load_flashinfer(spec: AttentionSpec) -> FlashInferLibrary:
    """The installed library, for a spec that its kernels take.

    Raises ValueError where they do not take it, ImportError where it cannot be imported; both name the remedy.
    """
    _check_spec(spec)
    try:
        return cast(FlashInferLibrary, importlib.import_module("flashinfer"))
    except ImportError as error:
        raise ImportError(
            f"FlashInfer cannot be imported ({error}): install it with `pip install 'muster[gpu]'`, "
            "or choose the attention kernel 'torch'"
        ) from error


def _check_spec(spec: AttentionSpec) -> None:
    """ValueError with the remedy where the kernels in use do not take `spec`."""
    if spec.key.width not in HEAD_DIMS or spec.dtype not in DTYPES:
        raise ValueError(
            f"FlashInfer takes head sizes {', '.join(map(str, HEAD_DIMS))} in float16 or bfloat16, not "
            f"{spec.key.width} in {str(spec.dtype).removeprefix('torch.')}: choose another dtype, or the attention "
            f"kernel 'torch'"
        )
    key, value = (spec.page.plane(view.plane) for view in (spec.key, spec.value))
    is_pair = key != value and spec.key.width == spec.value.width and len(spec.page.planes) == 2
    strides = [(plane.head_stride, plane.position_stride) for plane in (key, value)]
    if not is_pair or strides[0] != strides[1] or spec.listed:
        raise ValueError(
            f"FlashInfer takes keys and values that are two planes alike, not {spec.key} and {spec.value}"
            f"{' by lists of positions' * bool(spec.listed)}: choose the attention kernel 'torch'"
        )
