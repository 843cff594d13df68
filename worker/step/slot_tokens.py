"""The token drawn last in each slot, brought on the model's own collectives to the ranks that embed it next.

```
last stage   the rank that drew ── tp ── cp ──> every rank of the dp coordinate ── pp ──> first stage, same place
```
So a decode chunk names a slot, not a token, and no step waits for an answer of the host.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallel.collectives.communicator import Channel
from parallel.collectives.groups import RankGroups
from worker.step.rows import StepRows

#: Of a message that the first stage will receive: the slot of a token that nobody embeds any more.
_NONE = -1


@dataclass(kw_only=True)
class _Expected:
    """A message of the last stage that is still to be received: the slot of each of its tokens."""

    slots: list[int]


class SlotTokens:
    """One rank's view; all calls are collective over the ranks of its dp coordinate, stage by stage."""

    def __init__(self, *, num_slots: int, groups: RankGroups, device: torch.device) -> None:
        """`num_slots` of this dp coordinate."""
        self._tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._tp = groups["attn_tp"]
        self._cp = groups["attn_cp"]
        self._pp = groups["pp"]
        self._expected: deque[_Expected] = deque()

    def join(self, slot: int, token_id: int) -> None:
        """A new sequence takes `slot` with a token to embed; what is under way for an earlier one is void."""
        for message in self._expected:
            message.slots = [_NONE if expected == slot else expected for expected in message.slots]
        self._tokens[slot] = token_id

    def take(self, slots: Sequence[int]) -> torch.Tensor:
        """First stage: the tokens [len(slots)] to embed, received from the last stage where they are under way."""
        wanted = set(slots)
        while any(not wanted.isdisjoint(message.slots) for message in self._expected):
            self._receive()
        return self._tokens[torch.tensor(slots, dtype=torch.int64, device=self._tokens.device)]

    def expect(self, rows: StepRows) -> None:
        """First stage of several, once a step: the last stage will draw for the chunks in `rows`."""
        if rows.drawn_slots:
            self._expected.append(_Expected(slots=list(rows.drawn_slots)))
        # Of so many steps the oldest has ended: receiving it waits for nothing, and frees the sender.
        while len(self._expected) > self._pp.size + 1:
            self._receive()

    def share(self, rows: StepRows, drawn: Sequence[int], tokens_S: torch.Tensor) -> None:
        """Last stage: `tokens_S` [S] were drawn here for the slots `drawn`; all ranks of the dp coordinate get all."""
        slots = rows.drawn_slots
        if not slots:
            return
        message = tokens_S.new_zeros(len(slots))
        place_of = {slot: place for place, slot in enumerate(slots)}
        places = [(index, place_of[slot]) for index, slot in enumerate(drawn) if slot in place_of]
        message[[place for _, place in places]] = tokens_S[[index for index, _ in places]]
        # Each token was drawn by one rank, the others add zero.
        message = self._cp.all_gather(self._tp.all_gather(message).sum(0)).sum(0)
        if self._pp.size > 1:
            self._pp.send(message, to=0, channel=Channel.TOKENS)
        else:
            self._tokens[slots] = message

    def _receive(self) -> None:
        slots = self._expected.popleft().slots
        message = self._tokens.new_empty(len(slots))
        self._pp.receive(message, source=self._pp.size - 1, channel=Channel.TOKENS)
        kept = [index for index, slot in enumerate(slots) if slot != _NONE]
        self._tokens[[slots[index] for index in kept]] = message[kept]
