"""Gathered KV: every coordinate's pages of the sequences in one workspace, in which attention is then as on one rank.

```
workspace   | pages of coordinate 0 ... pad | pages of coordinate 1 ... pad | ...      [cp · padded, 2, Hkv, P, D]
```
"""

from collections.abc import Sequence

import torch

from attention.exchange_choice import ExchangePolicy
from attention.exchange_chunk import ExchangeChunk
from attention.interface import AttentionBackend, AttentionRows
from parallel.collectives.communicator import Communicator


class GatherKv:
    """See Exchange. Each coordinate contributes its pages chunk by chunk, padded to the longest contribution."""

    def __init__(
        self,
        chunks: Sequence[ExchangeChunk],
        *,
        group: Communicator,
        backend: AttentionBackend,
        policy: ExchangePolicy,
        device: torch.device,
    ) -> None:
        self._group = group
        size = policy.page_size
        lengths = [
            [chunk.num_pages_of(coordinate, page_size=size) for coordinate in range(group.size)] for chunk in chunks
        ]
        padded = max(map(sum, zip(*lengths, strict=True)))
        own = [page for chunk in chunks for page in chunk.pages_of(group.index, page_size=size)]
        self._own = torch.tensor(own + [0] * (padded - len(own)), dtype=torch.int64, device=device)
        rows, first = [], [coordinate * padded for coordinate in range(group.size)]
        for chunk, counts in zip(chunks, lengths, strict=True):
            addresses = _addresses(chunk, first=first, num_pages=sum(counts))
            first = [start + count for start, count in zip(first, counts, strict=True)]
            rows += [
                AttentionRows(
                    num_rows=segment.end - segment.start,
                    kv_len=segment.end,
                    page_table=addresses[: -(-segment.end // size)],
                )
                for segment in chunk.segments_of(group.index)
            ]
        self._plan = backend.plan(rows)

    def attend(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        workspace = self._group.all_gather(kv.index_select(0, self._own)).flatten(0, 1)
        return self._plan.run(q, workspace)


def _addresses(chunk: ExchangeChunk, *, first: Sequence[int], num_pages: int) -> list[int]:
    """The workspace's page of each page of the table, in order of position; `first` is each coordinate's next."""
    following = list(first)
    addresses = []
    for place in chunk.table.places[:num_pages]:
        addresses.append(following[place.coordinate])
        following[place.coordinate] += 1
    return addresses
