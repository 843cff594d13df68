"""One rank's share of the experts: which it holds in each layer, and how rows get to them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moe.dispatch_choice import Dispatch, DispatchPolicy
from moe.dispatchers import Dispatchers
from moe.slots import SlotMap
from parallel.collectives.communicator import Communicator
from parallel.link import LINKS
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import ExpertSizes
from parallel.sharding import experts_of


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """In one layer: `held` is the expert of each of this rank's slots, `slots` where all experts of the block are."""

    held: tuple[int, ...]
    slots: SlotMap


@dataclass(frozen=True, kw_only=True)
class ExpertShare:
    """In every layer this rank has equally many slots, which begin at `first_slot` of the block."""

    layers: Mapping[int, LayerShare]
    first_slot: int
    dispatchers: Dispatchers


def expert_share(
    description: ModelDescription,
    sizes: ExpertSizes,
    *,
    ep_rank: int,
    block: Communicator,
    settings: EngineSettings,
    device: torch.device,
) -> ExpertShare:
    """The share of the rank at `ep_rank` of its block."""
    assert description.experts is not None
    tables = experts_of(description, sizes)
    shares = {
        table.slots: LayerShare(held=table.held_by(ep_rank), slots=SlotMap(table, device=device))
        for table in tables.values()
    }
    slots_per_rank = next(iter(tables.values())).slots_per_rank
    policy = DispatchPolicy(
        sizes=sizes,
        top_k=description.experts.top_k,
        row_bytes=description.hidden_size * settings.dtype_bytes,
        link=LINKS[block.link],
        forced=None if settings.dispatch == "auto" else Dispatch(settings.dispatch),
    )
    return ExpertShare(
        layers={layer: shares[table.slots] for layer, table in tables.items()},
        first_slot=ep_rank * slots_per_rank,
        dispatchers=Dispatchers(block, policy=policy, slots_per_rank=slots_per_rank, device=device),
    )
