"""What one cp rank brings to an exchange, the same at every step."""

from dataclasses import dataclass

import torch

from attention.exchange.choice import ExchangePolicy
from attention.interface import AttentionBackend
from parallel.collectives.communicator import Communicator


@dataclass(frozen=True, kw_only=True)
class CpMember:
    """A rank in its cp group, with the kernel that attends there and the policy that all of the group share."""

    group: Communicator
    backend: AttentionBackend
    policy: ExchangePolicy
    device: torch.device
