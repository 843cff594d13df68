"""The two ends of a stage: where its rows come from, and what becomes of them.

```
first stage   token ids ── embedding ──> layers ── send ──> next stage
last stage    previous stage ── receive ──> layers ── output, draw ──> tokens
```
A replica of one stage has the first's beginning and the last's end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from parallel.collectives.communicator import Channel
from parallel.collectives.groups import RankGroups
from proto import control_pb2
from worker.blocks.vocabulary import Embedding, Output
from worker.kernels.interface import Draw, Kernels
from worker.step.rows import StepRows
from worker.step.slot_tokens import SlotTokens


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What this rank drew: the slot, the logits [V] and the token of each draw, and whether the logits are numbers."""

    slots: list[int]
    logits_SV: torch.Tensor
    tokens_S: torch.Tensor
    is_finite_S: torch.Tensor


class StageInput(Protocol):
    """Gives a stage's layers their rows."""

    def __call__(self, rows: StepRows) -> torch.Tensor:
        """This rank's rows [L, H]."""
        ...


class StageOutput(Protocol):
    """Takes the rows from a stage's layers."""

    def __call__(self, rows: StepRows, x_LH: torch.Tensor) -> Drawn:
        """What was drawn from them, nothing where another stage follows."""
        ...


class EmbeddingInput:
    """The first stage's."""

    def __init__(self, embedding: Embedding, *, slot_tokens: SlotTokens, is_last: bool, device: torch.device) -> None:
        self._embedding = embedding
        self._slot_tokens = slot_tokens
        self._is_last = is_last
        self._device = device

    def __call__(self, rows: StepRows) -> torch.Tensor:
        """Collective over tp."""
        ids = torch.from_numpy(rows.token_ids).to(self._device, non_blocking=True)
        if len(rows.slot_rows):
            tokens = self._slot_tokens.take(rows.slots.tolist())
            ids[torch.from_numpy(rows.slot_rows).to(self._device, non_blocking=True)] = tokens
        if not self._is_last:
            self._slot_tokens.expect(rows)
        return self._embedding(ids, local_rows=rows.local_rows)


class PipelineInput:
    """A later stage's: the rows of the rank at the same place of the stage before."""

    def __init__(self, *, groups: RankGroups, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pp = groups["pp"]
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device

    def __call__(self, rows: StepRows) -> torch.Tensor:
        """Waits for the stage before."""
        x = torch.empty((rows.local_rows, self._hidden_size), dtype=self._dtype, device=self._device)
        return self._pp.receive(x, source=self._pp.index - 1, channel=Channel.HIDDEN)


class PipelineOutput:
    """An earlier stage's: to the rank at the same place of the next stage, without waiting for it."""

    def __init__(self, *, groups: RankGroups) -> None:
        self._pp = groups["pp"]

    def __call__(self, rows: StepRows, x_LH: torch.Tensor) -> Drawn:
        """See StageOutput."""
        self._pp.send(x_LH, to=self._pp.index + 1, channel=Channel.HIDDEN)
        nothing = torch.empty(0, dtype=torch.int64, device=x_LH.device)
        return Drawn(slots=[], logits_SV=x_LH.new_empty((0, 0)), tokens_S=nothing, is_finite_S=nothing.bool())


class DrawOutput:
    """The last stage's: logits of the rows that end a chunk, and their tokens, each on the row's own rank."""

    def __init__(
        self,
        output: Output,
        *,
        kernels: Kernels,
        slot_tokens: SlotTokens,
        groups: RankGroups,
        shares_output: bool,
        sampling: Callable[[int], control_pb2.Sampling],
    ) -> None:
        """`shares_output`: a stage's ranks multiply each other's rows. `sampling` is that of a slot."""
        self._output = output
        self._kernels = kernels
        self._slot_tokens = slot_tokens
        self._tp = groups["attn_tp"]
        self._shares_output = shares_output
        self._sampling = sampling

    def __call__(self, rows: StepRows, x_LH: torch.Tensor) -> Drawn:
        """Collective over the dp coordinate's ranks, and over those that share the output."""
        local = rows.draws.rows - self._tp.index * rows.local_rows
        is_own = (local >= 0) & (local < rows.local_rows)
        slots, positions = rows.draws.slots[is_own].tolist(), rows.draws.positions[is_own].tolist()
        logits_SV = x_LH.new_empty((0, 0), dtype=torch.float32)
        tokens_S = torch.empty(0, dtype=torch.int64, device=x_LH.device)
        is_finite_S = tokens_S.bool()
        if len(is_own) or (self._shares_output and rows.draws.padded):
            index = torch.from_numpy(local[is_own]).to(x_LH.device, non_blocking=True)
            logits_SV = self._output(x_LH[index], padded_draws=rows.draws.padded)
        if slots:
            places = zip(slots, positions, strict=True)
            draws = [Draw(sampling=self._sampling(slot), position=position) for slot, position in places]
            # A step that is planned ahead embeds the token before anybody hears of the flag: it is a legal one.
            tokens_S, is_finite_S = self._kernels.draw(logits_SV, draws)
        for row, slot in enumerate(slots):
            if slot in rows.probes and rows.probes[slot].HasField("forced_id"):
                tokens_S[row] = rows.probes[slot].forced_id
        self._slot_tokens.share(rows, slots, tokens_S)
        return Drawn(slots=slots, logits_SV=logits_SV, tokens_S=tokens_S, is_finite_S=is_finite_S)
