"""From experts to the slots of a block: where an expert is held twice, its rows take turns.

The turn is a row's number in the block, not when it came: so the same row goes to the same slot on every rank.
"""

import torch

from parallel.expert_table import ExpertTable


class SlotMap:
    """The placement table on the device: `slots` int32 [E, most copies], and the `copies` of each expert int32 [E]."""

    def __init__(self, table: ExpertTable, *, device: torch.device) -> None:
        most = max(map(len, table.slots_of))
        padded = [[slots[index % len(slots)] for index in range(most)] for slots in table.slots_of]
        self.slots = torch.tensor(padded, dtype=torch.int32, device=device)
        self.copies = torch.tensor([len(slots) for slots in table.slots_of], dtype=torch.int32, device=device)

    def choose(self, ids_TK: torch.Tensor, *, first_row: int) -> torch.Tensor:
        """Expert ids [T, k] to slots int32 [T, k], the rows being first_row and following of the block."""
        rows = torch.arange(first_row, first_row + len(ids_TK), device=ids_TK.device).unsqueeze(1)
        return self.slots[ids_TK, rows % self.copies[ids_TK]]
