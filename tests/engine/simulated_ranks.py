"""Ranks under a leader, simulated: they hold what they are told, answer when the test says so, and prove every plan."""

import random
from collections import deque
from collections.abc import Sequence

from parallel.page_columns import column, packed
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from tests.engine.simulated_tables import Chunk, SimulatedTables
from tests.harness.cache_groups import FULL
from worker.engine.leader import Leader
from worker.engine.pipeline_choice import PipelineChoice

#: What ranks draw. No prompt has any of them: so nobody finds what was drawn in the prefix cache.
STOP = 99
_DRAWN = range(STOP, STOP + 10)


class SimulatedRanks:
    """A leader and its ranks; tokens are random, answers come when the test says so."""

    def __init__(
        self,
        *,
        shape: ReplicaShape,
        settings: EngineSettings,
        groups: Sequence[CacheGroup] = FULL,
        seed: int = 0,
        faults: float = 0.0,
        pipeline: PipelineChoice | None = None,
    ) -> None:
        """`faults` is the share of draws without numbers, and of writes that fail."""
        self.leader = Leader(shape=shape, settings=settings, groups=groups, pipeline=pipeline)
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.drawn: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.failed: set[int] = set()
        self.wanted: list[int] = []
        self.reserved: dict[int, control_pb2.Reserved] = {}
        self.wanted_tokens: dict[int, list[int]] = {}
        self.most_tokens: dict[int, int] = {}
        self.tables = [
            SimulatedTables(cp=shape.attention.cp, groups=groups, settings=settings, prompts=self.prompts)
            for _ in range(shape.attention.dp)
        ]
        self._shape = shape
        self._groups = groups
        self._settings = settings
        self._faults = faults
        self._random = random.Random(seed)
        self._unanswered: list[deque[int]] = [deque() for _ in range(shape.world_size)]
        self._chunks: dict[int, list[list[Chunk]]] = {}
        self._drawers: dict[int, list[int]] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._finished_end: dict[int, int] = {}
        self._unwritten: list[Chunk] = []

    # ---- what the test does ----

    def plan(self) -> list[step_pb2.StepPlan] | None:
        """Plans one step if the leader may and can; every rank applies it at once."""
        plans = self.leader.next_plan() if self.leader.can_plan else None
        if plans is None:
            return None
        (step_id,) = {plan.step_id for plan in plans}
        self._check_new_pages_are_read_by_nobody(plans)
        chunks = [tables.apply(plan) for tables, plan in zip(self.tables, plans, strict=True)]
        most = max(max(tables.rows) for tables in self.tables)
        (padded_rows,), (padded_draws,) = (
            {plan.padded_rows for plan in plans},
            {plan.padded_draws for plan in plans},
        )
        assert padded_rows == -(-most // self._shape.attention.tp)
        # Of a cp rank those of its decoding rows are known here; prompts that end add some.
        decoding = max(max(tables.decode_rows) for tables in self.tables)
        draws = max(sum(chunk.is_drawn for chunk in part) for part in chunks)
        assert min(decoding, padded_rows) <= padded_draws <= min(draws, padded_rows)
        assert padded_draws > 0 or draws == 0
        self._chunks[step_id] = chunks
        for ranks in self._unanswered:
            ranks.append(step_id)
        self._draw(step_id)
        handed_off = [chunk for part in chunks for chunk in part if chunk.is_handed_off]
        self._unwritten += handed_off * self._shape.ranks_per_sequence
        self.check_tables()
        return plans

    @property
    def owes_answers(self) -> bool:
        """Whether a rank has a step that it has not answered."""
        return any(self._unanswered)

    def answer(self) -> None:
        """One rank answers its next step: each goes in order, and none waits for another. Another draws each step."""
        rank = self._random.choice([rank for rank, steps in enumerate(self._unanswered) if steps])
        step_id, dp = self._unanswered[rank].popleft(), self._shape.coordinates(rank).attn_dp_rank
        result = step_pb2.StepResult(step_id=step_id, global_rank=rank)
        if rank in self._drawers[step_id]:
            drawn = [chunk for chunk in self._chunks[step_id][dp] if chunk.is_drawn]
            result.slots.extend(chunk.slot for chunk in drawn)
            result.token_ids.extend(self._tokens[step_id, chunk.request_id] for chunk in drawn)
            result.not_finite.extend(slot for slot in result.slots if self._happens())
        self._finish_if_last(step_id)
        self.leader.handle_result(result)

    def answer_all(self) -> None:
        """All ranks answer every step that is in flight; their writes stay open."""
        while self.owes_answers:
            self.answer()
            self.listen()

    def write(self) -> None:
        """One rank reports one write."""
        request_id = self._unwritten.pop(self._random.randrange(len(self._unwritten))).request_id
        if self._happens():
            self.leader.handle_writes_failed(step_pb2.WritesFailed(request_id=request_id, reason="it broke off"))
        self.leader.handle_writes(step_pb2.WritesDone(request_id=request_id, bytes=1))

    def listen(self) -> None:
        """Takes the leader's events; nothing may be said of a request that has ended."""
        for event in self.leader.take_events():
            kind = event.WhichOneof("event")
            if kind == "tokens":
                for request_id, token in zip(event.tokens.request_ids, event.tokens.token_ids, strict=True):
                    assert request_id not in self.ended
                    self.drawn.setdefault(request_id, []).append(token)
            elif kind == "ended":
                assert event.ended.request_id not in self.ended
                self.ended[event.ended.request_id] = event.ended.reason
            elif kind == "failed":
                assert event.failed.request_id not in self.failed
                self.failed.add(event.failed.request_id)
            elif kind == "want_target":
                self.wanted.append(event.want_target.request_id)
            elif kind == "reserved":
                self._take_reserved(event.reserved)
        self.leader.check_integrity()
        self.check_tables()

    def settle(self) -> None:
        """Answers everything until nothing is left."""
        while True:
            self.give_targets()
            self.start_all()
            planned = self.plan()
            if self.owes_answers:
                self.answer()
            elif self._unwritten:
                self.write()
            elif planned is None:
                self.listen()
                if not self.wanted and not self.reserved:
                    return
            self.listen()

    def give_targets(self) -> None:
        """A decode replica has room for all."""
        for request_id in self.wanted:
            pages = [control_pb2.Pages(cp_ranks=packed([0] * 64), pages=packed(range(64))) for _ in self._groups]
            target = control_pb2.Target(request_id=request_id, pages=pages)
            self.leader.handle(control_pb2.ToReplica(target=target))
        self.wanted = []

    def submit(self, submit: control_pb2.Submit) -> None:
        """A request of the router."""
        self.prompts[submit.request_id] = tuple(submit.prompt_ids)
        self.most_tokens[submit.request_id] = submit.max_new_tokens
        self.leader.handle(control_pb2.ToReplica(submit=submit))
        self.listen()

    def reserve(self, request_id: int, *, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """A request whose prompt is prefilled elsewhere; `max_new_tokens` with the one that is drawn there."""
        self.prompts[request_id] = tuple(prompt_ids)
        self.most_tokens[request_id] = max_new_tokens - 1
        reserve = control_pb2.Reserve(
            request_id=request_id, prompt_tokens=len(prompt_ids), max_new_tokens=max_new_tokens
        )
        self.leader.handle(control_pb2.ToReplica(reserve=reserve))
        self.listen()

    def start_all(self) -> None:
        """The KV of every reserved sequence has come, and a token with it."""
        for request_id, reserved in self.reserved.items():
            prompt_ids = self.prompts[request_id]
            self.tables[reserved.dp].receive(reserved, prompt_tokens=len(prompt_ids))
            start = control_pb2.Start(
                request_id=request_id,
                prompt_ids=prompt_ids,
                output_ids=[9],
                max_new_tokens=self.most_tokens[request_id],
                stop_token_ids=[STOP],
            )
            self.leader.handle(control_pb2.ToReplica(start=start))
        self.reserved = {}

    def act(self, verb: str) -> None:
        """One of the things that may happen next."""
        if verb == "plan":
            self.plan()
        elif verb == "answer" and self.owes_answers:
            self.answer()
        elif verb == "write" and self._unwritten:
            self.write()
        elif verb == "targets":
            self.give_targets()
        elif verb == "start":
            self.start_all()
        self.listen()

    # ---- what is proven ----

    def check_tables(self) -> None:
        """What ranks see is what the leader holds: from the first page that a next query sees on, as far as all steps
        before have finished; and nothing before it.
        """
        for sequence in self.leader.sequences():
            pages = self.leader.pages_of(sequence)
            if not sequence.joined or sequence.finish_reason:
                continue
            tables = self.tables[sequence.dp].pages(sequence.request_id)
            end = self._finished_end.get(sequence.request_id, 0)
            for group, held, told in zip(self._groups, pages, tables, strict=True):
                table = dict(enumerate(zip(held.cp_ranks, held.pages, strict=True), held.first_page))
                assert table == {place: page for place, page in told.items() if place >= held.first_page}
                if group.window:
                    seen_from = max(end, sequence.cached_tokens) - group.window + 1
                    assert held.first_page == max(0, seen_from) // self._settings.page_size

    def _check_new_pages_are_read_by_nobody(self, plans: Sequence[step_pb2.StepPlan]) -> None:
        """A page that begins is in no row's sight of a step in flight, and no write that is under way reads it."""
        for dp, plan in enumerate(plans):
            read = {page for parts in self._chunks.values() for chunk in parts[dp] for page in chunk.seen}
            read |= {
                page
                for chunk in self._unwritten
                for page in chunk.handed_off
                if chunk.request_id in {known.request_id for known in self.tables[dp].known.values()}
            }
            for number, new in enumerate(plan.new_pages):
                places = zip(column(new.cp_ranks).tolist(), column(new.pages).tolist(), strict=True)
                assert not read & {(number, *place) for place in places}, "a page begins that is still read"

    def _finish_if_last(self, step_id: int) -> None:
        if any(step_id in steps for steps in self._unanswered):
            return
        for chunk in (chunk for part in self._chunks.pop(step_id) for chunk in part):
            self._finished_end[chunk.request_id] = chunk.end

    # ---- what ranks do ----

    def _draw(self, step_id: int) -> None:
        """What each chunk of the step draws: known to the test in the order of steps, told in that of answers. One rank
        of each dp coordinate draws, each step another.
        """
        for chunk in (chunk for part in self._chunks[step_id] for chunk in part if chunk.is_drawn):
            token = self._random.choice(_DRAWN)
            self._tokens[step_id, chunk.request_id] = token
            self.wanted_tokens.setdefault(chunk.request_id, []).append(token)
        ranks: dict[int, list[int]] = {}
        for rank in range(self._shape.world_size):
            ranks.setdefault(self._shape.coordinates(rank).attn_dp_rank, []).append(rank)
        self._drawers[step_id] = [part[step_id % len(part)] for part in ranks.values()]

    def _take_reserved(self, reserved: control_pb2.Reserved) -> None:
        self.reserved[reserved.request_id] = reserved
        self._finished_end[reserved.request_id] = len(self.prompts[reserved.request_id])

    def _happens(self) -> bool:
        return self._random.random() < self._faults
