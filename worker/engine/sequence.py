"""One sequence as the leader sees it: counts of what was planned and what came back, everything else derived.

```
tokens      | prompt and earlier outputs .............. | drawn here ......
             0          planned_tokens -> prefill_end     -> compute_end
```
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from proto import control_pb2
from worker.engine.handoff_writes import HandoffWrites
from worker.engine.prefix_cache import PageKeys


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """`tokens` grow as results come back: `num_given` were there at first, of which `num_prompt_tokens` the client's
    prompt. `planned_tokens` counts positions whose KV some planned step computes.

    `prefill_end` is the first position that no prompt chunk covers: from there each chunk embeds the token drawn last.
    From `compute_end` on nothing is computed here. Up to `plain_until` a token of decode changes counts alone.
    `cached_tokens` of its prompt were found in the prefix cache. `home` computes its rows while it decodes. `joined`
    says that ranks know it. `page_keys` are for the prefix cache, None where it has no part in it.
    """

    request_id: int
    tokens: "array[int]"
    num_prompt_tokens: int
    num_given: int
    prefill_end: int
    compute_end: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: control_pb2.Sampling
    forced_ids: Items[int] = ()
    wants_logits: bool = False
    handoff: bool = False
    target: control_pb2.Target | None = None
    cached_tokens: int = 0
    page_keys: PageKeys | None = None
    dp: int = -1
    slot: int = -1
    home: int = 0
    planned_tokens: int = 0
    plain_until: int = 0
    in_flight: int = 0
    writes: HandoffWrites = field(default_factory=HandoffWrites)
    finish_reason: str = ""
    joined: bool = False

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are left to plan."""
        return self.planned_tokens < self.prefill_end

    @property
    def is_probed(self) -> bool:
        """Whether anything is asked of what it draws."""
        return self.wants_logits or bool(self.forced_ids)

    @property
    def tokens_ahead(self) -> int:
        """Tokens that are still to be computed for it here, at most."""
        return self.compute_end - self.planned_tokens

    @property
    def is_quiet(self) -> bool:
        """Whether no planned step touches it and no write of its KV is under way."""
        return self.in_flight == 0 and self.writes.num_pending == 0

    @property
    def num_drawn(self) -> int:
        """Tokens that were drawn here."""
        return len(self.tokens) - self.num_given

    @property
    def num_outputs(self) -> int:
        """Tokens after the prompt, those of an earlier life included."""
        return len(self.tokens) - self.num_prompt_tokens

    def draw(self, token_id: int) -> None:
        """Takes the next drawn token and sees whether it is the last."""
        self.tokens.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) - self.num_given >= self.max_new_tokens:
            self.finish_reason = "length"
        elif self.handoff:
            self.finish_reason = "handoff"


def from_submit(message: control_pb2.Submit) -> Sequence:
    """A sequence whose prompt, and outputs of an earlier life, are to be prefilled; its last position draws a token."""
    tokens = _token_array(message.prompt_ids, message.output_ids)
    return Sequence(
        request_id=message.request_id,
        tokens=tokens,
        num_prompt_tokens=len(message.prompt_ids),
        num_given=len(tokens),
        prefill_end=len(tokens),
        compute_end=len(tokens) + (0 if message.handoff else message.max_new_tokens - 1),
        max_new_tokens=message.max_new_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        sampling=message.sampling,
        forced_ids=tuple(message.probe.forced_ids),
        wants_logits=message.probe.logits,
        handoff=message.handoff,
    )


def from_start(message: control_pb2.Start) -> Sequence:
    """A sequence whose KV came by hand-off: all but its last token is in the pages reserved for it."""
    tokens = _token_array(message.prompt_ids, message.output_ids)
    return Sequence(
        request_id=message.request_id,
        tokens=tokens,
        num_prompt_tokens=len(message.prompt_ids),
        num_given=len(tokens),
        prefill_end=len(tokens) - 1,
        compute_end=len(tokens) + message.max_new_tokens - 1,
        planned_tokens=len(tokens) - 1,
        max_new_tokens=message.max_new_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        sampling=message.sampling,
        forced_ids=tuple(message.probe.forced_ids),
        wants_logits=message.probe.logits,
    )


def _token_array(*parts: Iterable[int]) -> "array[int]":
    tokens = array("I")
    for part in parts:
        tokens.extend(part)
    return tokens
