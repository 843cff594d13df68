"""The leader of a replica: admits, plans steps, takes results, and says what became of each request.

It holds state and does no input or output: messages of the router and of the members go in, step plans and events come
out. So the same leader runs over real ranks and over mocked ones.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from parallel.admission import check_fits, pages_needed
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from proto import control_pb2, step_pb2
from worker.engine.dp_state import DpState
from worker.engine.pages import PageAllocator
from worker.engine.peer_orders import PeerOrders
from worker.engine.prefix_cache import PageKeys
from worker.engine.reservations import Reservations
from worker.engine.sequence import Sequence, from_start, from_submit


@dataclass(kw_only=True)
class _StepInFlight:
    """A step that was sent out: its chunks, the ranks that have not answered, and answers that wait for their turn."""

    chunks: list[tuple[Sequence, step_pb2.Chunk]]
    silent: set[int]
    early: list[step_pb2.StepResult] = field(default_factory=list)
    by_slot: dict[int, Sequence] = field(init=False)

    def __post_init__(self) -> None:
        self.by_slot = {chunk.slot: sequence for sequence, chunk in self.chunks}


class Leader:
    """Scheduling state of one replica. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        *,
        shape: ReplicaShape,
        settings: EngineSettings,
        vocab_size: int | None = None,
        revision: bytes = b"",
    ) -> None:
        """`vocab_size` bounds what ranks can embed, None where any id will do. `revision` is the model's, for the keys
        of the prefix cache.
        """
        self._vocab_size = vocab_size
        self._shape = shape
        self._settings = settings
        self._revision = revision
        self._dp_states = [
            DpState(dp=dp, pp=shape.pp, sizes=shape.attention, settings=settings) for dp in range(shape.attention.dp)
        ]
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._reservations = Reservations(self._dp_states, cp=shape.attention.cp)
        self._peer_orders = PeerOrders(world_size=shape.world_size)
        self._steps: dict[int, _StepInFlight] = {}
        self._next_step_id = 0
        self._has_freed = False
        self._leaves: list[int] = []
        self._events: list[control_pb2.Event] = []
        self._tokens = control_pb2.Tokens()
        self._totals = control_pb2.Load()

    # ---- what comes in ----

    def handle(self, message: control_pb2.ToReplica) -> None:
        """Takes one message of the router. Messages about requests that have ended are late and change nothing."""
        kind = message.WhichOneof("message")
        if kind == "submit":
            self._submit(message.submit)
        elif kind == "target":
            self._take_target(message.target)
        elif kind == "reserve":
            self._reserve(message.reserve)
        elif kind == "start":
            self._start(message.start)
        elif kind == "abort":
            self._abort(message.abort.request_id)
        elif kind == "release":
            self._release_reservation(message.release.request_id)
        else:
            raise ValueError(f"a leader does not take a message of kind {kind}")
        self._admit()

    def handle_result(self, result: step_pb2.StepResult) -> None:
        """Takes what one rank answers to a step."""
        if result.global_rank == 0:
            self._totals.num_steps += 1
            self._totals.step_s += result.step_s
            self._totals.collective_s += result.collective_s
        # A sequence's tokens may be drawn on another rank each step, and that one may answer before this one does.
        self._steps[result.step_id].early.append(result)
        while self._steps:
            step_id, step = next(iter(self._steps.items()))
            for early in step.early:
                self._take_result(step, early)
            step.early.clear()
            if step.silent:
                break
            self._finish_step(step_id)
        self._admit_if_freed()

    def _take_result(self, step: _StepInFlight, result: step_pb2.StepResult) -> None:
        step.silent.remove(result.global_rank)
        for index, (slot, token_id) in enumerate(zip(result.slots, result.token_ids, strict=True)):
            sequence = step.by_slot[slot]
            if slot in result.not_finite:
                self._dp_states[sequence.dp].withdraw(sequence)
            if sequence.finish_reason:
                continue
            if result.logits:
                self._emit_logits(sequence, result.logits[index])
            if slot in result.not_finite:
                self._break(sequence)
            else:
                self._draw(sequence, token_id)

    def handle_peer_answer(self, answer: step_pb2.PeerAnswer) -> None:
        """Takes one rank's word that it has carried out an order about a replica of the other pool."""
        answered = self._peer_orders.take(answer)
        if answered is not None:
            self._emit(control_pb2.Event(peer_answered=answered))

    def handle_writes_failed(self, failed: step_pb2.WritesFailed) -> None:
        """Takes one rank's word that a hand-off cannot be: it ends; its pages stay while a write is under way."""
        sequence = self._sequences[failed.request_id]
        if sequence.finish_reason in ("", "handoff"):
            self._fail(sequence, f"rank {failed.global_rank}: {failed.reason}", kind=control_pb2.FAILURE_KIND_HANDOFF)

    def handle_writes(self, done: step_pb2.WritesDone) -> None:
        """Takes one rank's word that of its writes of one chunk none is under way any more."""
        sequence = self._sequences[done.request_id]
        sequence.pending_writes -= 1
        sequence.writes_may_land |= done.may_land
        sequence.handed_off_bytes += done.bytes
        before = sequence.write_seconds.get(done.global_rank, 0.0)
        sequence.write_seconds[done.global_rank] = before + done.seconds
        self._end_if_quiet(sequence)
        self._admit_if_freed()

    # ---- what goes out ----

    @property
    def can_plan(self) -> bool:
        """Whether one more step may be in flight: pp running and one planned ahead."""
        return len(self._steps) < self._shape.pp + 1

    @property
    def is_idle(self) -> bool:
        """Whether the replica holds nothing of any request."""
        return not (self._sequences or self._waiting or self._reservations or self._steps)

    @property
    def oldest_step(self) -> tuple[int, frozenset[int]] | None:
        """The id of the oldest step in flight and the ranks that have not answered it."""
        for step_id, step in self._steps.items():
            return step_id, frozenset(step.silent)
        return None

    def next_plan(self) -> step_pb2.StepPlan | None:
        """Plans the next step; None where no sequence has anything to do."""
        chunks = [pair for state in self._dp_states for pair in state.plan_chunks()]
        if not chunks:
            return None
        plan = step_pb2.StepPlan(step_id=self._next_step_id, leaves=self._leaves)
        self._leaves = []
        self._next_step_id += 1
        for sequence, _ in chunks:
            if not sequence.joined:
                plan.joins.append(self._join(sequence))
                sequence.joined = True
            if sequence.handoff:
                sequence.pending_writes += self._shape.ranks_per_sequence
                # Its last chunk gives back what was promised and not taken.
                self._has_freed = True
        plan.chunks.extend(chunk for _, chunk in chunks)
        self._steps[plan.step_id] = _StepInFlight(chunks=chunks, silent=set(range(self._shape.world_size)))
        return plan

    def take_events(self) -> list[control_pb2.Event]:
        """What the router has to know since the last call: tokens first, then what they led to."""
        events, self._events = self._events, []
        if self._tokens.request_ids:
            events.insert(0, control_pb2.Event(tokens=self._tokens))
            self._tokens = control_pb2.Tokens()
        if events:
            events.append(control_pb2.Event(load=self._load()))
        return events

    def check_integrity(self) -> None:
        """AssertionError unless every page is free or owned once and, when idle, all are free."""
        for state in self._dp_states:
            state.pages.check_integrity()
            if self.is_idle:  # the cache gives up whatever it has
                expected = self._settings.num_pages * self._shape.attention.cp
                assert state.pages.num_free == expected, "an idle replica holds pages"

    # ---- requests ----

    def _submit(self, message: control_pb2.Submit) -> None:
        if not self._is_sound([*message.prompt_ids, *message.output_ids], message):
            return
        sequence = from_submit(message)
        if self._settings.prefix_cache:
            sequence.page_keys = PageKeys(page_size=self._settings.page_size, salt=self._revision)
            sequence.page_keys.extend(sequence.tokens, end=len(sequence.tokens))
        new_tokens = 0 if sequence.handoff else sequence.max_new_tokens
        if self._may_fit(sequence.request_id, len(sequence.tokens), new_tokens):
            self._waiting.append(sequence)

    def _admit_if_freed(self) -> None:
        """Looks at the queue only where pages or a slot came back: looking costs the length of its first prompt."""
        if self._has_freed:
            self._admit()

    def _admit(self) -> None:
        """Admits waiting prompts first come first served, then reservations likewise."""
        self._has_freed = False
        while self._waiting and self._try_admit(self._waiting[0]):
            self._waiting.popleft()
        for reserved in self._reservations.grant():
            self._emit(control_pb2.Event(reserved=reserved))

    def _try_admit(self, sequence: Sequence) -> bool:
        """Admits it where the least work is, its own that is not cached included; False where it fits nowhere."""
        with_slot = [state for state in self._dp_states if state.has_slot]
        # Without its cached pages too: those lie as they lie, and beside them it may not fit where it would alone.
        found = [(cached, c) for c in with_slot for cached in (self._cached(c, sequence), [])]
        fitting = [
            (cached, c) for cached, c in found if c.pages.fits(self._pages_promised(sequence, cached), cached=cached)
        ]
        if not fitting:
            return False
        size = self._settings.page_size
        cached, state = min(
            fitting,
            key=lambda item: (item[1].tokens_ahead - len(item[0]) * size, -item[1].pages.num_free, item[1].dp),
        )
        pages = self._pages_promised(sequence, cached)
        state.pages.promise(sequence.request_id, pages, cached=cached)
        sequence.num_joined_pages = len(cached)
        sequence.planned_tokens = len(cached) * self._settings.page_size
        sequence.dp, sequence.slot = state.dp, state.take_slot()
        self._sequences[sequence.request_id] = state.running[sequence.request_id] = sequence
        if sequence.handoff:
            want = control_pb2.WantTarget(request_id=sequence.request_id)
            self._emit(control_pb2.Event(want_target=want))
        else:
            self._emit_admitted(sequence)
        return True

    def _cached(self, state: DpState, sequence: Sequence) -> list[bytes]:
        """The keys of its first pages that are cached there; its last token is never among them: it is to be drawn
        from.
        """
        most = (len(sequence.tokens) - 1) // self._settings.page_size
        digests = sequence.page_keys.digests[:most] if sequence.page_keys else []
        return digests[: state.pages.num_cached(digests)]

    def _take_target(self, target: control_pb2.Target) -> None:
        sequence = self._sequences.get(target.request_id)
        if sequence is not None and not sequence.finish_reason:
            sequence.target = target
            self._emit_admitted(sequence)

    def _reserve(self, message: control_pb2.Reserve) -> None:
        request_id, tokens = message.request_id, message.prompt_tokens + message.max_new_tokens
        if self._may_fit(request_id, message.prompt_tokens, message.max_new_tokens):
            pages = -(-tokens // self._settings.page_size)
            self._reservations.add(request_id, num_pages=pages)

    def _start(self, message: control_pb2.Start) -> None:
        if not self._is_sound(message.output_ids, message):
            self._reservations.release(message.request_id)
            return
        reservation = self._reservations.take(message.request_id)
        assert reservation.dp is not None
        sequence = from_start(message)
        sequence.dp, sequence.slot = reservation.dp, reservation.slot
        sequence.num_joined_pages = reservation.num_pages
        self._sequences[sequence.request_id] = sequence
        self._dp_states[sequence.dp].running[sequence.request_id] = sequence

    def _abort(self, request_id: int) -> None:
        for waiting in self._waiting:
            if waiting.request_id == request_id:
                self._waiting.remove(waiting)
                self._emit_ended(request_id, "abort")
                return
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            sequence.finish_reason = sequence.finish_reason or "abort"
            self._end_if_quiet(sequence)

    def _release_reservation(self, request_id: int) -> None:
        if self._reservations.release(request_id):
            self._emit_ended(request_id, "abort")

    # ---- steps ----

    def _draw(self, sequence: Sequence, token_id: int) -> None:
        sequence.draw(token_id)
        self._tokens.request_ids.append(sequence.request_id)
        self._tokens.token_ids.append(token_id)

    def _break(self, sequence: Sequence) -> None:
        """Ends a sequence whose logits hold no numbers."""
        place = len(sequence.tokens) - sequence.num_prompt_tokens
        message = f"the model's logits for output token {place} hold NaN or infinity"
        self._fail(sequence, message, kind=control_pb2.FAILURE_KIND_NOT_FINITE)

    def _fail(self, sequence: Sequence, message: str, *, kind: control_pb2.FailureKind) -> None:
        sequence.finish_reason = "failed"
        failed = control_pb2.Failed(request_id=sequence.request_id, kind=kind, message=message)
        self._emit(control_pb2.Event(failed=failed))

    def _finish_step(self, step_id: int) -> None:
        for sequence, _ in self._steps.pop(step_id).chunks:
            sequence.in_flight -= 1
            self._end_if_quiet(sequence)

    def _end_if_quiet(self, sequence: Sequence) -> None:
        if not sequence.finish_reason or not sequence.is_quiet:
            return
        state = self._dp_states[sequence.dp]
        state.release(sequence)
        self._has_freed = True
        del self._sequences[sequence.request_id]
        if sequence.joined:
            self._leaves.append(sequence.slot)
        if sequence.finish_reason == "handoff":
            self._emit(control_pb2.Event(handoff_done=self._handoff_done(sequence)))
        self._emit_ended(sequence.request_id, sequence.finish_reason, writes_may_land=sequence.writes_may_land)

    def _join(self, sequence: Sequence) -> step_pb2.SequenceJoin:
        places = self._dp_states[sequence.dp].pages.table(sequence.request_id)[: sequence.num_joined_pages]
        join = step_pb2.SequenceJoin(slot=sequence.slot, request_id=sequence.request_id, sampling=sequence.sampling)
        join.pages.extend(control_pb2.Page(coordinate=place.coordinate, page=place.page) for place in places)
        if sequence.prefill_end < len(sequence.tokens):
            join.first_token = sequence.tokens[-1]
        if sequence.target is not None:
            join.target.CopyFrom(sequence.target)
        return join

    # ---- small parts ----

    def _pages_promised(self, sequence: Sequence, cached: list[bytes]) -> int:
        """New pages a cp rank must be able to hold: of the prompt where it is handed off, of all tokens else."""
        tokens = len(sequence.tokens) + (0 if sequence.handoff else sequence.max_new_tokens)
        tokens -= len(cached) * self._settings.page_size
        return pages_needed(tokens, page_size=self._settings.page_size, cp=self._shape.attention.cp)

    def _is_sound(self, token_ids: Items[int], message: control_pb2.Submit | control_pb2.Start) -> bool:
        """Whether ranks can run it; refuses at once what would break them, and all that they run beside it."""
        problem = ""
        largest = max([*token_ids, *message.probe.forced_ids], default=0)
        if not token_ids:
            problem = "there is no token to begin with"
        elif message.max_new_tokens < 1:
            problem = "max_new_tokens is 0: it must be 1 or more"
        elif self._vocab_size is not None and largest >= self._vocab_size:
            problem = f"token id {largest} has no embedding: ids are 0 to {self._vocab_size - 1}"
        if problem:
            self._refuse(message.request_id, problem)
        return not problem

    def _refuse(self, request_id: int, message: str) -> None:
        self._emit(control_pb2.Event(refused=control_pb2.Refused(request_id=request_id, message=message)))

    def _may_fit(self, request_id: int, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether an empty replica could hold it; refuses it at once where not."""
        try:
            check_fits(
                prompt_tokens=prompt_tokens,
                max_new_tokens=max_new_tokens,
                settings=self._settings,
                cp=self._shape.attention.cp,
            )
        except ValueError as error:
            self._refuse(request_id, str(error))
            return False
        return True

    def _handoff_done(self, sequence: Sequence) -> control_pb2.HandoffDone:
        return control_pb2.HandoffDone(
            request_id=sequence.request_id,
            bytes=sequence.handed_off_bytes,
            seconds=max(sequence.write_seconds.values(), default=0.0),
        )

    def _load(self) -> control_pb2.Load:
        queued = self._reservations.num_queued
        return control_pb2.Load(
            free_pages=sum(state.pages.num_free for state in self._dp_states),
            running=len(self._sequences) + len(self._reservations) - queued,
            waiting=len(self._waiting) + queued,
            num_steps=self._totals.num_steps,
            step_s=self._totals.step_s,
            collective_s=self._totals.collective_s,
        )

    def _emit(self, event: control_pb2.Event) -> None:
        self._events.append(event)

    def _emit_admitted(self, sequence: Sequence) -> None:
        cached = 0 if sequence.page_keys is None else sequence.num_joined_pages * self._settings.page_size
        admitted = control_pb2.Admitted(request_id=sequence.request_id, cached_tokens=cached)
        self._emit(control_pb2.Event(admitted=admitted))

    def _emit_ended(self, request_id: int, reason: str, *, writes_may_land: bool = False) -> None:
        ended = control_pb2.Ended(request_id=request_id, reason=reason, writes_may_land=writes_may_land)
        self._emit(control_pb2.Event(ended=ended))

    def _emit_logits(self, sequence: Sequence, values: bytes) -> None:
        logits = control_pb2.Logits(request_id=sequence.request_id, output_index=sequence.num_drawn, float32=values)
        self._emit(control_pb2.Event(logits=logits))

    def allocators(self) -> Iterator[PageAllocator]:
        """The page allocators of all coordinates, for tests and reports."""
        for state in self._dp_states:
            yield from state.pages.allocators

    def sequences(self) -> Iterator[Sequence]:
        """The admitted sequences, for tests and reports."""
        yield from self._sequences.values()
