"""One rank's share of the experts, the same in every layer: its slots, and how rows get to them."""

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
class ExpertShare:
    """`held` is the expert of each of this rank's slots, which begin at `first_slot` of the block."""

    held: tuple[int, ...]
    first_slot: int
    slots: SlotMap
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
    table = experts_of(description, sizes)
    policy = DispatchPolicy(
        sizes=sizes,
        top_k=description.experts.top_k,
        row_bytes=description.hidden_size * settings.dtype_bytes,
        link=LINKS[device.type],
        forced=None if settings.dispatch == "auto" else Dispatch(settings.dispatch),
    )
    return ExpertShare(
        held=table.held_by(ep_rank),
        first_slot=ep_rank * table.slots_per_rank,
        slots=SlotMap(table, device=device),
        dispatchers=Dispatchers(block, policy=policy, slots_per_rank=table.slots_per_rank, device=device),
    )
