"""The KV memory of one rank: one region `[layer, page, 2, kv_head, position, head_dim]`, head-major inside a page."""

from dataclasses import dataclass

import torch

from parallel.model_share import ModelShare
from parallel.settings import EngineSettings


@dataclass(frozen=True, kw_only=True)
class KvMemory:
    """`region[i]` is the memory of the stage's i-th layer, contiguous; `first_layer` is the model's number of i = 0."""

    region: torch.Tensor
    first_layer: int

    @property
    def layer_bytes(self) -> int:
        """Bytes from one layer's memory to the next."""
        return self.region.stride(0) * self.region.element_size()

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return int(self.region.shape[3])


def allocate_kv(share: ModelShare, *, settings: EngineSettings, dtype: torch.dtype, device: torch.device) -> KvMemory:
    """Zeroed memory: values that nothing has written yet are multiplied, by zero, and must be finite."""
    sizes = (
        len(share.layers),
        settings.num_pages,
        2,
        share.kv_heads.padded,
        settings.page_size,
        share.description.head_dim,
    )
    return KvMemory(region=torch.zeros(sizes, dtype=dtype, device=device), first_layer=share.layers.start)
