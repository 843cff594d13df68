"""Hidden states between blocks are split by rows over a group; these two bring them together and apart again."""

import torch

from parallel.collectives.communicator import Communicator


def gather_rows(group: Communicator, x: torch.Tensor) -> torch.Tensor:
    """Collective: every rank's x [T, ...] as [size · T, ...], in order of index."""
    return group.all_gather(x).flatten(0, 1)


def reduce_scatter_rows(group: Communicator, x: torch.Tensor) -> torch.Tensor:
    """Collective: from partial sums x [size · T, ...] on every rank, this rank's own T rows of the sum."""
    return group.reduce_scatter(x.view(group.size, x.shape[0] // group.size, *x.shape[1:]))
