"""The KV memory of one rank: one region of bytes, which `parallel/storage.py` lays out, and a view of each layer."""

from dataclasses import dataclass

import torch

from attention.layer_memory import LayerFormat, LayerMemory, bind_layer
from native.arena import Arena
from parallel.storage import CacheGroup, RankStorage


@dataclass(frozen=True, kw_only=True)
class KvMemory:
    """`region` uint8, contiguous."""

    storage: RankStorage
    region: torch.Tensor

    def layer(self, layer: int, *, group: CacheGroup, scale: float) -> LayerMemory:
        """The memory of the model's layer `layer`, which is one of `group`'s."""
        own = self.storage.group(group.name)
        start = own.layer_start(layer)
        pages = self.region[start : start + own.layer_bytes].view(own.num_pages, own.page.page_bytes)
        return bind_layer(pages, LayerFormat(page=own.page, key=group.key, value=group.value, scale=scale))


def allocate_kv(storage: RankStorage, *, device: torch.device) -> KvMemory:
    """Zeroed memory: values that nothing has written yet are multiplied, by zero, and must be finite."""
    if device.type == "cpu" and storage.num_bytes:
        # In huge pages, and none of them is there before it is used.
        region = torch.frombuffer(Arena().take(storage.num_bytes), dtype=torch.uint8)
    else:
        region = torch.zeros(storage.num_bytes, dtype=torch.uint8, device=device)
    return KvMemory(storage=storage, region=region)
