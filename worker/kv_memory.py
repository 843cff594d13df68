"""The KV memory of one rank: one region `[layer, page, 2, kv_head, position, head_dim]`, head-major inside a page."""

from dataclasses import dataclass

import torch

from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import RankCoordinates, ReplicaShape
from parallel.sharding import kv_head_interval, stage_layers


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


def allocate_kv(
    description: ModelDescription,
    *,
    shape: ReplicaShape,
    coordinates: RankCoordinates,
    settings: EngineSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> KvMemory:
    """Zeroed memory: a page's positions that nothing has written yet are read by padded kernels and must be finite."""
    layers = stage_layers(description, shape=shape, pp_rank=coordinates.pp_rank)
    heads = kv_head_interval(description.num_kv_heads, tp=shape.attention.tp, tp_rank=coordinates.attn_tp_rank)
    sizes = (len(layers), settings.num_pages, 2, heads.padded, settings.page_size, description.head_dim)
    return KvMemory(region=torch.zeros(sizes, dtype=dtype, device=device), first_layer=layers.start)
