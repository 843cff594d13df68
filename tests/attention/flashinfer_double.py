"""A double of what the FlashInfer backend calls, in plain torch on any device, from the library's documented meaning.

Pass this module as `library`. It has the parameters that the backend passes and no others, refuses what the real
kernels do not take, and gives base-2 log-sum-exps. It states what the library is believed to do; only a GPU shows
that it does.
"""

import math
from dataclasses import dataclass

import torch

INT32 = torch.int32


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a wrapper was last planned for; the device copies that the real one makes are clones here."""

    qo_indptr: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    window_left: int
    sm_scale: float
    q_data_type: torch.dtype
    kv_data_type: torch.dtype

    def __post_init__(self) -> None:
        tables = (self.qo_indptr, self.indptr, self.indices, self.last_page_len)
        assert all(table.dtype == INT32 and table.ndim == 1 for table in tables)
        assert self.qo_indptr.is_cpu and self.indptr.is_cpu and self.last_page_len.is_cpu
        assert len(self.qo_indptr) == len(self.indptr) == len(self.last_page_len) + 1 > 1
        assert self.qo_indptr[0] == self.indptr[0] == 0 and self.indptr[-1] == len(self.indices)
        assert (self.indptr.diff() > 0).all() and (self.qo_indptr.diff() > 0).all()
        assert ((self.last_page_len >= 1) & (self.last_page_len <= self.page_size)).all()
        assert self.num_qo_heads % self.num_kv_heads == 0

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], *, q_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert q.shape == (self.qo_indptr[-1], self.num_qo_heads, self.head_dim) and q.dtype == self.q_data_type
        for cache in paged_kv_cache:
            assert cache.shape[1:] == (self.num_kv_heads, self.page_size, self.head_dim)
            assert cache.dtype == self.kv_data_type and cache.stride() == paged_kv_cache[0].stride()
        states = [
            self._run_sequence(index, q, paged_kv_cache, scale=self.sm_scale * q_scale)
            for index in range(len(self.last_page_len))
        ]
        return torch.cat([output for output, _ in states]).to(q.dtype), torch.cat([lse for _, lse in states])

    def _run_sequence(
        self, index: int, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], *, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = q[self.qo_indptr[index] : self.qo_indptr[index + 1]].float()
        pages = self.indices[self.indptr[index] : self.indptr[index + 1]].long()
        kv_len = (len(pages) - 1) * self.page_size + int(self.last_page_len[index])
        group = self.num_qo_heads // self.num_kv_heads
        k, v = (
            cache[pages].float().transpose(1, 2).flatten(0, 1)[:kv_len].repeat_interleave(group, dim=1)
            for cache in paged_kv_cache
        )
        scores = torch.einsum("qhd,khd->qhk", rows, k) * scale
        own = (torch.arange(len(rows)) + kv_len - len(rows))[:, None]
        if self.causal:
            scores.masked_fill_((torch.arange(kv_len) > own)[:, None], -math.inf)
        if self.window_left >= 0:
            scores.masked_fill_((torch.arange(kv_len) < own - self.window_left)[:, None], -math.inf)
        output = torch.einsum("qhk,khd->qhd", scores.softmax(dim=-1), v)
        return output, scores.logsumexp(dim=-1) / math.log(2)


class _Wrapper:
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "HND"
        assert not float_workspace_buffer.any(), "the workspace must be zeros at its first use"
        self.planned: _Plan | None = None

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        q_scale: float,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.planned is not None and return_lse
        return self.planned.run(q, paged_kv_cache, q_scale=q_scale)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query row of each sequence, which sees all its keys."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, *, use_tensor_cores: bool) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores

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
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8, 16)
        self.planned = _Plan(
            qo_indptr=torch.arange(len(indptr), dtype=INT32),
            indptr=indptr.clone(),
            indices=indices.clone(),
            last_page_len=last_page_len.clone(),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            causal=False,
            window_left=window_left,
            sm_scale=sm_scale,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Several query rows of each sequence, causal from the bottom right or not at all."""

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
        self.planned = _Plan(
            qo_indptr=qo_indptr.clone(),
            indptr=paged_kv_indptr.clone(),
            indices=paged_kv_indices.clone(),
            last_page_len=paged_kv_last_page_len.clone(),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            causal=causal,
            window_left=window_left,
            sm_scale=sm_scale,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str,
) -> None:
    """Writes row i to position positions[i] of sequence batch_indices[i], whose table already counts it."""
    tables = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    assert all(table.dtype == INT32 and table.is_contiguous() for table in tables) and kv_layout == "HND"
    assert len(batch_indices) == len(positions) == len(append_key) == len(append_value) > 0
    assert len(kv_indptr) == len(kv_last_page_len) + 1 and kv_indptr[-1] == len(kv_indices)
    assert paged_kv_cache[0].stride() == paged_kv_cache[1].stride()
    page_size = paged_kv_cache[0].shape[2]
    for row, (sequence, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        pages = kv_indices[kv_indptr[sequence] : kv_indptr[sequence + 1]]
        assert position < (len(pages) - 1) * page_size + kv_last_page_len[sequence]
        page, offset = int(pages[position // page_size]), position % page_size
        paged_kv_cache[0][page, :, offset] = append_key[row]
        paged_kv_cache[1][page, :, offset] = append_value[row]


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges v [T, S, Hq, D] with base-2 s [T, S, Hq]; states of -inf count nothing, none at all give zeros."""
    assert v.is_contiguous() and s.is_contiguous() and s.dtype == torch.float32 and v.shape[:3] == s.shape and len(v)
    lse = torch.logsumexp(s.double() * math.log(2), dim=1)
    weights = (s.double() * math.log(2) - torch.where(lse.isneginf(), 0.0, lse)[:, None]).exp()
    return (v * weights[..., None]).sum(dim=1).to(v.dtype), (lse / math.log(2)).float()
