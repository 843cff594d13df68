"""One generation as the router sees it: what was asked, what it holds on which replica, what the client gets."""

import asyncio
import time
from dataclasses import dataclass, field

from proto import control_pb2
from router.replica import Replica


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A validated request: every default is filled in."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: control_pb2.Sampling
    probe: control_pb2.Probe = field(default_factory=control_pb2.Probe)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, at most."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class TokensEvent:
    """New tokens, in order."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FinishedEvent:
    """No token follows; `reason` is stop, length or abort."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class FailedEvent:
    """The generation cannot go on."""

    error: Exception


GenerationEvent = TokensEvent | FinishedEvent | FailedEvent


class Clock:
    """When things happened, in seconds since the request was accepted; 0 where they have not."""

    def __init__(self) -> None:
        self._accepted = time.perf_counter()
        self.admitted_s = 0.0
        self.first_token_s = 0.0
        self.handed_off_s = 0.0
        self.last_token_s = 0.0

    def now(self) -> float:
        """Seconds since the request was accepted."""
        return time.perf_counter() - self._accepted


@dataclass(kw_only=True)
class Generation:
    """A request on its way. `prefill` and `decode` are the replicas that hold something of it."""

    request_id: int
    request: GenerationRequest
    prefill: Replica | None
    decode: Replica | None = None
    wanted_decode: Replica | None = None
    token_ids: list[int] = field(default_factory=list)
    events: asyncio.Queue[GenerationEvent] = field(default_factory=asyncio.Queue)
    logits: list[bytes] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    is_admitted: bool = False
    is_finished: bool = False
    is_aborted: bool = False
    is_handed_off: bool = False
    cached_tokens: int = 0
    handoff_bytes: int = 0
    handoff_write_s: float = 0.0

    def finish(self, reason: str) -> None:
        """Tells the client once that no token follows."""
        if not self.is_finished:
            self.is_finished = True
            self.events.put_nowait(FinishedEvent(reason=reason))

    def fail(self, error: Exception) -> None:
        """Tells the client once that the generation cannot go on."""
        if not self.is_finished:
            self.is_finished = True
            self.events.put_nowait(FailedEvent(error=error))

    def add_tokens(self, token_ids: list[int]) -> None:
        """Hands new tokens to the client, unless it has been told the end."""
        self.token_ids += token_ids
        self.clock.last_token_s = self.clock.now()
        self.clock.first_token_s = self.clock.first_token_s or self.clock.last_token_s
        if not self.is_finished:
            self.events.put_nowait(TokensEvent(token_ids=tuple(token_ids)))
