"""How rows enter a block that attention's tp splits, and leave it.

```
residual [L, H] ── norm ── all-gather over tp ──> the block's rows [T, H] ── products ──┐
residual [L, H] + own rows of the sum <── reduce-scatter over tp ── partial sums [T, H] ┘
```
With one tp rank nothing lies between: the norm goes with the product behind it, the residual with the one before.
"""

import torch

from moe.linear import Linear, RowOperation
from parallel.collectives.communicator import Communicator
from parallel.collectives.rows import gather_rows, reduce_scatter_rows


class EnteringRows:
    """From the residual to the rows that a block's first product takes."""

    def __init__(self, norm: RowOperation | None, *, tp: Communicator) -> None:
        """`norm` is done to this rank's own rows, where the product does not do it."""
        self._norm = norm
        self._tp = tp

    def __call__(self, x_LH: torch.Tensor) -> torch.Tensor:
        """Collective over tp: x [L, H] to [T, H], T = tp · L rows."""
        rows = x_LH if self._norm is None else self._norm(x_LH)
        return rows if self._tp.size == 1 else gather_rows(self._tp, rows)


class LeavingRows:
    """A block's last product, its partial sums added up over tp, and to the residual."""

    def __init__(self, linear: Linear, *, tp: Communicator) -> None:
        self._linear = linear
        self._tp = tp

    def __call__(self, x_TI: torch.Tensor, *, residual: torch.Tensor) -> torch.Tensor:
        """Collective over tp: x [T, I] and the residual [L, H] to the new one."""
        if self._tp.size == 1:
            return self._linear(x_TI, plus=residual)
        return residual + reduce_scatter_rows(self._tp, self._linear(x_TI))
