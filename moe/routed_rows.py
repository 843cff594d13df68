"""Rows that have been through a gate, as one message each: a collective costs its latency whatever it carries.

```
| x: H elements | slots: k int32 | weights: k float32 |        a row that only pads has NO_SLOT in all of its slots
```
"""

from dataclasses import dataclass
from functools import cached_property

import torch

#: The slot of a row that only pads.
NO_SLOT = -1


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """What a row's message holds: H = `hidden_size` elements of `dtype`, and `top_k` choices."""

    hidden_size: int
    dtype: torch.dtype
    top_k: int

    @property
    def x_bytes(self) -> int:
        """Bytes of a row without its choices."""
        return self.hidden_size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a message."""
        return self.x_bytes + 8 * self.top_k

    def empty(self, num_rows: int, *, device: torch.device) -> "RoutedRows":
        """Messages that are still to be filled."""
        return RoutedRows(torch.empty((num_rows, self.row_bytes), dtype=torch.uint8, device=device), self)


@dataclass(frozen=True)
class RoutedRows:
    """Messages `packed` uint8 [N, row_bytes], contiguous, and views of their parts."""

    packed: torch.Tensor
    form: RowFormat

    @cached_property
    def x(self) -> torch.Tensor:
        """[N, H]."""
        return self.packed[:, : self.form.x_bytes].view(self.form.dtype)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int32 [N, k]."""
        return self.packed[:, self.form.x_bytes : self.form.row_bytes - 4 * self.form.top_k].view(torch.int32)

    @cached_property
    def weights(self) -> torch.Tensor:
        """float32 [N, k]."""
        return self.packed[:, self.form.row_bytes - 4 * self.form.top_k :].view(torch.float32)

    def over(self, packed: torch.Tensor) -> "RoutedRows":
        """Other messages of the same form: a choice of these, or those of other ranks."""
        return RoutedRows(packed, self.form)
