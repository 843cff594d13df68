"""One sequence as the leader sees it: counts of what was planned and what came back, everything else derived.

```
tokens      | prompt and earlier outputs .............. | drawn here ......
             0          planned_tokens -> prefill_end
```
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from proto import control_pb2
from worker.engine.handoff_writes import HandoffWrites
from worker.engine.prefix_cache import PageKeys


@dataclass(kw_only=True)
class Sequence:
    """`tokens` grow as results come back; `planned_tokens` counts positions whose KV some planned step computes.

    `num_joined_pages` are in its table before its first chunk: found in the prefix cache, or reserved for a hand-off.
    `cached_tokens` of its prompt were found in the prefix cache. `joined` says that ranks know it.
    `page_keys` are for the prefix cache, None where it has no part in it.
    `prefill_end` is the first position that no prompt chunk covers: from there each chunk embeds the token drawn last.
    """

    request_id: int
    tokens: list[int]
    prefill_end: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: control_pb2.Sampling
    forced_ids: Items[int] = ()
    wants_logits: bool = False
    handoff: bool = False
    target: control_pb2.Target | None = None
    num_joined_pages: int = 0
    cached_tokens: int = 0
    page_keys: PageKeys | None = None
    dp: int = -1
    slot: int = -1
    planned_tokens: int = 0
    num_planned_draws: int = 0
    num_drawn: int = 0
    in_flight: int = 0
    last_turn: int = 0
    writes: HandoffWrites = field(default_factory=HandoffWrites)
    num_prompt_tokens: int = 0
    finish_reason: str = ""
    joined: bool = False

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are left to plan."""
        return not self.finish_reason and self.planned_tokens < self.prefill_end

    @property
    def can_decode(self) -> bool:
        """Whether one more token may be planned from the one drawn last."""
        return (
            not self.finish_reason
            and not self.handoff
            and self.planned_tokens >= self.prefill_end
            and self.num_planned_draws < self.max_new_tokens
        )

    @property
    def tokens_ahead(self) -> int:
        """Tokens that are still to be computed for it here, at most."""
        outputs = 0 if self.handoff else self.max_new_tokens - self.num_planned_draws
        return max(self.prefill_end - self.planned_tokens, 0) + max(outputs, 0)

    @property
    def is_quiet(self) -> bool:
        """Whether no planned step touches it and no write of its KV is under way."""
        return self.in_flight == 0 and self.writes.num_pending == 0

    @property
    def num_outputs(self) -> int:
        """Tokens after the prompt, those of an earlier life included."""
        return len(self.tokens) - self.num_prompt_tokens

    def draw(self, token_id: int) -> None:
        """Takes the next drawn token and sees whether it is the last."""
        self.tokens.append(token_id)
        self.num_drawn += 1
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_drawn >= self.max_new_tokens:
            self.finish_reason = "length"
        elif self.handoff:
            self.finish_reason = "handoff"


def from_submit(message: control_pb2.Submit) -> Sequence:
    """A sequence whose prompt, and outputs of an earlier life, are to be prefilled."""
    tokens = [*message.prompt_ids, *message.output_ids]
    return Sequence(
        request_id=message.request_id,
        tokens=tokens,
        num_prompt_tokens=len(message.prompt_ids),
        prefill_end=len(tokens),
        max_new_tokens=message.max_new_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        sampling=message.sampling,
        forced_ids=tuple(message.probe.forced_ids),
        wants_logits=message.probe.logits,
        handoff=message.handoff,
    )


def from_start(message: control_pb2.Start) -> Sequence:
    """A sequence whose KV came by hand-off: all but its last token is in the pages reserved for it."""
    tokens = [*message.prompt_ids, *message.output_ids]
    return Sequence(
        request_id=message.request_id,
        tokens=tokens,
        num_prompt_tokens=len(message.prompt_ids),
        prefill_end=len(tokens) - 1,
        planned_tokens=len(tokens) - 1,
        max_new_tokens=message.max_new_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        sampling=message.sampling,
        forced_ids=tuple(message.probe.forced_ids),
        wants_logits=message.probe.logits,
    )
