"""In how many parts a batch of decode goes through the stages: a pure choice, by the time of one round.

In a round each sequence draws one token. With m parts, m stages work at once, each on another part:

```
1 part    stage 0  AB ...... AB ......        every weight is read once a round; the other stages wait
          stage 1  ...... AB ...... AB
2 parts   stage 0  A.  B.  A.  B.             no stage waits; every weight is read twice a round
          stage 1      A.  B.  A.  B.
```
A part's token is on the way through all stages before its next, and a stage takes one part after the other; so a round
takes max(sum of the stages' times, m * the slowest one's). Parts win where a step's time grows with its rows, or where
stages have memories of their own; the whole batch where cores of one host share a memory and few rows read all weights.
"""

from dataclasses import dataclass
from typing import Protocol

from parallel.link import DeviceSpeed
from parallel.stage_cost import StageCost


class PipelineChoice(Protocol):
    """Says in how many parts a batch goes."""

    def num_parts(self, *, rows: int, context: float) -> int:
        """For `rows` on the rank that has most, after `context` tokens on average; 1 to as many as stages."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedParts:
    """Always so many."""

    parts: int

    def num_parts(self, *, rows: int, context: float) -> int:
        """See PipelineChoice."""
        del rows, context
        return self.parts


@dataclass(frozen=True, kw_only=True)
class Host:
    """The one that the leader is on: its `units` (cores, or accelerators), how many of them each rank has, and how many
    ranks of the replica are on it.
    """

    speed: DeviceSpeed
    units: int
    units_per_rank: int
    num_ranks: int


@dataclass(frozen=True, kw_only=True)
class FastestParts:
    """The number of parts whose round is shortest, the fewest of equals: each part has a cost of its own beside."""

    stages: tuple[StageCost, ...]
    stage_size: int
    host: Host

    def num_parts(self, *, rows: int, context: float) -> int:
        """See PipelineChoice."""
        most = min(len(self.stages), max(rows, 1))
        return min(range(1, most + 1), key=lambda parts: self.round_s(rows=rows, context=context, parts=parts))

    def round_s(self, *, rows: int, context: float, parts: int) -> float:
        """Seconds until each sequence has one more token."""
        each = -(-rows // parts)
        times = [self._stage_s(stage, rows=each, context=context, busy_stages=parts) for stage in self.stages]
        return max(sum(times), parts * max(times))

    def _stage_s(self, stage: StageCost, *, rows: int, context: float, busy_stages: int) -> float:
        """Seconds of one step of `rows` on a stage while so many stages work."""
        host = self.host
        asked = min(host.num_ranks, busy_stages * self.stage_size) * host.units_per_rank
        # More threads than cores: each has its share of one.
        own = host.units_per_rank * min(1.0, host.units / asked)
        read_bytes_per_s = own * host.speed.reads(units=min(asked, host.units), of=host.units)
        products_s = max(stage.read_bytes(rows) / read_bytes_per_s, stage.flops(rows) / (own * host.speed.flops))
        key_s = max(
            stage.key_bytes(context) / read_bytes_per_s, stage.key_flops(context) / (own * host.speed.key_flops)
        )
        return products_s + rows * key_s


def choose_pipeline(setting: str, *, stages: tuple[StageCost, ...], stage_size: int, host: Host) -> PipelineChoice:
    """What `engine.pipeline` asks for."""
    if setting == "whole":
        return FixedParts(parts=1)
    if setting == "parts":
        return FixedParts(parts=len(stages))
    return FastestParts(stages=stages, stage_size=stage_size, host=host)
