"""The leader over simulated ranks: random requests, early ends, late answers, and pages proven at every step."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, RankCoordinates, ReplicaShape
from proto import control_pb2, step_pb2
from worker.engine.leader import Leader
from worker.step.rows import SequenceTables, StepRows

STOP = 3


class SimulatedRanks:
    """Real tables of every rank under a leader; tokens are random, answers come when the test says so."""

    def __init__(
        self, leader: Leader, *, shape: ReplicaShape, settings_: EngineSettings, seed: int, faults: float = 0.0
    ) -> None:
        """`faults` is the share of draws without numbers, and of writes that fail."""
        self.leader = leader
        self.failed: set[int] = set()
        self._faults = faults
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.drawn: dict[int, list[int]] = {}
        self._settings = settings_
        self._memory: dict[tuple[int, int, int], object] = {}
        self.ended: dict[int, str] = {}
        self.wanted: list[int] = []
        self._shape = shape
        self._random = random.Random(seed)
        self._unanswered: list[deque[step_pb2.StepPlan]] = [deque() for _ in range(shape.world_size)]
        self._request_of: dict[int, int] = {}
        self._tokens_of: dict[int, list[int]] = {}
        self.wanted_tokens: dict[int, list[int]] = {}
        self._tables = [self._table(shape.coordinates(rank), settings_) for rank in range(shape.world_size)]
        self._targets: dict[int, int] = {}
        self._unwritten: list[int] = []

    def plan(self) -> bool:
        """Plans one step if the leader may and can; every rank applies it at once."""
        plan = self.leader.next_plan() if self.leader.can_plan else None
        if plan is None:
            return False
        for plans in self._unanswered:
            plans.append(plan)
        for join in plan.joins:
            self._request_of[join.slot] = join.request_id
            self._targets.pop(join.slot, None)
            if join.HasField("target"):
                self._targets[join.slot] = join.request_id
        rows = [table.apply(plan) for table in self._tables]
        self._check_memory(rows)
        last = rows[-self._shape.stage_size :]
        self._draw(plan)
        drawn = [item for part in last for _, item in part.draws]
        assert sorted(item.chunk.slot for item in drawn) == sorted(c.slot for c in plan.chunks if c.sample)
        writers = self._shape.ranks_per_sequence
        self._unwritten += [self._targets[c.slot] for c in plan.chunks if c.slot in self._targets] * writers
        return True

    def _check_memory(self, rows: list[StepRows]) -> None:
        """Every row writes its prompt's prefix into its page; what a chunk finds cached is its own prompt's prefix."""
        for rank, part in enumerate(rows[: self._shape.stage_size]):
            row = 0
            for segment in part.segments:
                for position in range(segment.start, segment.end):
                    place = (rank, int(part.pages[row]), int(part.offsets[row]))
                    self._memory[place] = self._prefix(segment.sequence.request_id, position)
                    row += 1
        for item in (item for part in rows for item in part.chunks):
            dp = self._settings.dp_rank_of(item.sequence.slot)
            for position in range(item.end):
                page = item.sequence.table.places[position // self._settings.page_size]
                rank = self._shape.attention_rank(dp=dp, cp=page.coordinate)
                found = self._memory[rank, page.page, position % self._settings.page_size]
                assert found == self._prefix(item.sequence.request_id, position)

    def _prefix(self, request_id: int, position: int) -> object:
        """What KV at a position stands for: the prompt up to it; of drawn tokens, whose they are."""
        prompt_ids = self.prompts[request_id]
        return prompt_ids[: position + 1] if position < len(prompt_ids) else (prompt_ids, request_id, position)

    def _draw(self, plan: step_pb2.StepPlan) -> None:
        """What each chunk of the step draws: known to the test in the order of steps, told in that of answers."""
        self._tokens_of[plan.step_id] = []
        for chunk in plan.chunks:
            if chunk.sample:
                token = self._random.randint(0, 9)
                self._tokens_of[plan.step_id].append(token)
                self.wanted_tokens.setdefault(self._request_of[chunk.slot], []).append(token)

    @property
    def owes_answers(self) -> bool:
        """Whether a rank has a step that it has not answered."""
        return any(self._unanswered)

    def answer(self) -> None:
        """One rank answers its next step: each goes in order, and none waits for another. Another draws each step."""
        rank = self._random.choice([rank for rank, plans in enumerate(self._unanswered) if plans])
        plan = self._unanswered[rank].popleft()
        result = step_pb2.StepResult(step_id=plan.step_id, global_rank=rank)
        if rank == plan.step_id % self._shape.world_size:
            result.slots.extend(chunk.slot for chunk in plan.chunks if chunk.sample)
            result.token_ids.extend(self._tokens_of[plan.step_id])
            result.not_finite.extend(slot for slot in result.slots if self._happens())
        self.leader.handle_result(result)

    def answer_all(self) -> None:
        """All ranks answer every step that is in flight; their writes stay open."""
        while self.owes_answers:
            self.answer()
            self.listen()

    def write(self) -> None:
        """One rank reports one write."""
        request_id = self._unwritten.pop(self._random.randrange(len(self._unwritten)))
        if self._happens():
            self.leader.handle_writes_failed(step_pb2.WritesFailed(request_id=request_id, reason="it broke off"))
        self.leader.handle_writes(step_pb2.WritesDone(request_id=request_id, bytes=1))

    def _happens(self) -> bool:
        return self._random.random() < self._faults

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
        self.leader.check_integrity()

    def settle(self) -> None:
        """Answers everything until nothing is left."""
        while True:
            self.give_targets()
            planned = self.plan()
            if self.owes_answers:
                self.answer()
            elif self._unwritten:
                self.write()
            elif not planned:
                self.listen()
                if not self.wanted:
                    return
            self.listen()

    def give_targets(self) -> None:
        """A decode replica has room for all."""
        for request_id in self.wanted:
            pages = [control_pb2.Page(page=index) for index in range(64)]
            target = control_pb2.Target(request_id=request_id, pages=pages)
            self.leader.handle(control_pb2.ToReplica(target=target))
        self.wanted = []

    def submit(self, submit: control_pb2.Submit) -> None:
        """A request of the router."""
        self.prompts[submit.request_id] = tuple(submit.prompt_ids)
        self.leader.handle(control_pb2.ToReplica(submit=submit))
        self.listen()

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
        self.listen()

    def _table(self, coordinates: RankCoordinates, settings_: EngineSettings) -> SequenceTables:
        return SequenceTables(shape=self._shape, coordinates=coordinates, settings=settings_)


def prompt(chance: random.Random) -> list[int]:
    """Up to 30 tokens; many begin alike."""
    first = [chance.randint(0, 1)] * chance.choice((4, 8, 9))
    return [*first, *range(chance.randint(0, 20))]


VERBS = st.sampled_from(["submit", "submit", "plan", "plan", "plan", "answer", "answer", "write", "targets", "abort"])


@settings(max_examples=120, deadline=None)
@given(
    verbs=st.lists(VERBS, max_size=80),
    dp=st.integers(1, 2),
    cp=st.integers(1, 4),
    pp=st.integers(1, 2),
    handoff=st.booleans(),
    faults=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_whatever_happens_every_page_returns_and_every_request_ends_once(
    verbs: list[str], dp: int, cp: int, pp: int, handoff: bool, faults: float, seed: int
) -> None:
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=cp), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=10, max_sequences=3, kv_tokens=48)
    leader = Leader(shape=shape, settings=settings_)
    ranks = SimulatedRanks(leader, shape=shape, settings_=settings_, seed=seed, faults=faults)
    chance = random.Random(seed)
    submitted: dict[int, int] = {}
    for verb in verbs:
        if verb == "submit":
            request_id = len(submitted) + 1
            submitted[request_id] = chance.randint(2, 12)
            submit = control_pb2.Submit(
                request_id=request_id,
                prompt_ids=prompt(chance),
                max_new_tokens=submitted[request_id],
                stop_token_ids=[STOP],
                handoff=handoff,
            )
            ranks.submit(submit)
        elif verb == "abort" and submitted:
            abort = control_pb2.Abort(request_id=chance.choice(list(submitted)))
            ranks.leader.handle(control_pb2.ToReplica(abort=abort))
            ranks.listen()
        else:
            ranks.act(verb)
    ranks.settle()
    assert ranks.leader.is_idle
    assert ranks.ended.keys() == submitted.keys()
    for request_id, reason in ranks.ended.items():
        tokens = ranks.drawn.get(request_id, [])
        assert tokens == ranks.wanted_tokens.get(request_id, [])[: len(tokens)]
        assert STOP not in tokens[:-1]
        if reason == "stop":
            assert tokens[-1] == STOP
        elif reason == "length":
            assert len(tokens) == submitted[request_id]
        elif reason == "handoff":
            assert len(tokens) == 1
        assert (reason == "failed") is (request_id in ranks.failed)


def test_a_decode_reservation_is_named_waits_for_room_and_is_freed_by_release_only() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(page_size=4, kv_tokens=40, max_sequences=4))

    def reserve(request_id: int, tokens: int) -> None:
        message = control_pb2.Reserve(request_id=request_id, prompt_tokens=tokens, max_new_tokens=4)
        leader.handle(control_pb2.ToReplica(reserve=message))

    def named() -> list[int]:
        events = leader.take_events()
        return [event.reserved.request_id for event in events if event.HasField("reserved")]

    reserve(1, 24)
    reserve(2, 20)
    assert named() == [1]
    leader.handle(control_pb2.ToReplica(abort=control_pb2.Abort(request_id=1)))
    assert named() == []  # something may still write there
    leader.handle(control_pb2.ToReplica(release=control_pb2.Release(request_id=1)))
    assert named() == [2]
    reserve(3, 60)
    (refused,) = [event.refused for event in leader.take_events() if event.HasField("refused")]
    assert "needs 16 pages" in refused.message and "gives 10" in refused.message


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_pages_of_a_prompt_are_spread_over_the_cp_ranks(cp: int) -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=24, max_sequences=4, kv_tokens=400)
    ranks = SimulatedRanks(Leader(shape=shape, settings=settings_), shape=shape, settings_=settings_, seed=0)
    submit = control_pb2.Submit(request_id=1, prompt_ids=range(157), max_new_tokens=2, handoff=True)
    ranks.submit(submit)
    ranks.give_targets()
    while ranks.plan():
        pass
    (sequence,) = ranks.leader.sequences()
    held = [place.coordinate for place in ranks.leader._dp_states[0].pages.table(1)]
    pages = -(-sequence.planned_tokens // 4)
    assert len(held) == pages
    assert max(held.count(index) for index in range(cp)) <= -(-pages // cp) + 2


def test_a_prompt_that_fits_an_empty_pool_is_admitted_over_a_warm_cache_too() -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=4), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=3, kv_tokens=32)
    ranks = SimulatedRanks(Leader(shape=shape, settings=settings_), shape=shape, settings_=settings_, seed=0)
    for request_id in (1, 2, 3):
        ranks.submit(control_pb2.Submit(request_id=request_id, prompt_ids=range(88), max_new_tokens=8))
        ranks.settle()
        assert request_id in ranks.ended


def test_a_shared_first_page_does_not_draw_all_sequences_to_one_dp_coordinate() -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=4), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=64, kv_tokens=8000)
    ranks = SimulatedRanks(Leader(shape=shape, settings=settings_), shape=shape, settings_=settings_, seed=0)
    for request_id in range(1, 41):
        prompt_ids = [1, 2, 3, 4, *range(request_id, request_id + 20)]
        ranks.submit(control_pb2.Submit(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=16))
        ranks.plan()
    counts = [0] * 4
    for sequence in ranks.leader.sequences():
        counts[sequence.dp] += 1
    assert max(counts) - min(counts) <= 2, counts
    ranks.settle()


def test_results_of_a_later_step_wait_for_those_before_them() -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=2), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(page_size=4, kv_tokens=40, max_sequences=4))
    submit = control_pb2.Submit(request_id=1, prompt_ids=range(3), max_new_tokens=4)
    leader.handle(control_pb2.ToReplica(submit=submit))
    first, second = leader.next_plan(), leader.next_plan()
    assert first is not None and second is not None

    def answer(plan: step_pb2.StepPlan, *, rank: int, tokens: tuple[int, ...] = ()) -> list[int]:
        slots = [chunk.slot for chunk in plan.chunks][: len(tokens)]
        leader.handle_result(step_pb2.StepResult(step_id=plan.step_id, global_rank=rank, slots=slots, token_ids=tokens))
        return [token for event in leader.take_events() for token in event.tokens.token_ids]

    assert answer(first, rank=1) == []
    assert answer(second, rank=1, tokens=(8,)) == []
    assert answer(first, rank=0, tokens=(7,)) == [7, 8]
    assert answer(second, rank=0) == []


def test_a_half_written_page_of_an_aborted_prompt_is_not_found() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=10, max_sequences=3, kv_tokens=400)
    ranks = SimulatedRanks(Leader(shape=shape, settings=settings_), shape=shape, settings_=settings_, seed=0)
    ranks.submit(control_pb2.Submit(request_id=1, prompt_ids=range(100, 109), max_new_tokens=2))
    ranks.submit(control_pb2.Submit(request_id=2, prompt_ids=range(12), max_new_tokens=2))
    assert ranks.plan()  # the first takes 9 of the 10 tokens of a step, so the second's chunk ends inside a page
    ranks.leader.handle(control_pb2.ToReplica(abort=control_pb2.Abort(request_id=2)))
    ranks.settle()
    ranks.submit(control_pb2.Submit(request_id=3, prompt_ids=range(12), max_new_tokens=2))
    ranks.settle()
    assert ranks.ended[3] in ("length", "stop")


def test_new_pages_beside_a_prefix_that_lies_unevenly_stay_within_what_was_promised() -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=2), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=84, max_sequences=3, kv_tokens=4000)
    ranks = SimulatedRanks(Leader(shape=shape, settings=settings_), shape=shape, settings_=settings_, seed=0)
    ranks.submit(control_pb2.Submit(request_id=1, prompt_ids=range(90), max_new_tokens=2))
    ranks.settle()
    # Six pages of the first chunk lie on one cp rank, and chunks of 21 pages leave one over each time.
    prompt_ids = [*range(24), *range(1000, 1000 + 84 * 7)]
    ranks.submit(control_pb2.Submit(request_id=2, prompt_ids=prompt_ids, max_new_tokens=1))
    ranks.settle()
    assert 2 in ranks.ended


def test_each_of_the_steps_that_are_under_way_has_its_part_of_the_decoding_sequences() -> None:
    shape = ReplicaShape(pp=2, attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=8, kv_tokens=400)
    leader = Leader(shape=shape, settings=settings_)
    for request_id in range(1, 6):
        submit = control_pb2.Submit(request_id=request_id, prompt_ids=range(3), max_new_tokens=30)
        leader.handle(control_pb2.ToReplica(submit=submit))
    assert leader.next_plan() is not None  # the prompts
    decode = [leader.next_plan() for _ in range(2)]
    slots = [sorted(chunk.slot for chunk in plan.chunks) for plan in decode if plan is not None]
    # All five are in the prompts' step too, and in no more than one beside it.
    assert [len(part) for part in slots] == [3, 2]
    assert len({*slots[0], *slots[1]}) == 5


def test_a_reservation_that_waits_is_not_overtaken_by_smaller_ones() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(page_size=4, kv_tokens=40, max_sequences=4))
    for request_id, tokens in ((1, 24), (2, 28), (3, 4)):
        reserve = control_pb2.Reserve(request_id=request_id, prompt_tokens=tokens, max_new_tokens=4)
        leader.handle(control_pb2.ToReplica(reserve=reserve))
    named = [event.reserved.request_id for event in leader.take_events() if event.HasField("reserved")]
    assert named == [1]  # of ten pages three are left: room for the third, but the second is before it


def test_what_a_sequence_without_numbers_computed_is_found_by_nobody_and_read_on_by_those_that_had_found_it() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=3, kv_tokens=96)
    ranks = SimulatedRanks(Leader(shape=shape, settings=settings_), shape=shape, settings_=settings_, seed=0)

    def submit(request_id: int) -> int:
        """Returns how many of its tokens were cached."""
        ranks.prompts[request_id] = tuple(range(12))
        message = control_pb2.Submit(request_id=request_id, prompt_ids=range(12), max_new_tokens=2)
        ranks.leader.handle(control_pb2.ToReplica(submit=message))
        events = ranks.leader.take_events()
        return next(event.admitted.cached_tokens for event in events if event.WhichOneof("event") == "admitted")

    assert submit(1) == 0
    plan = ranks.leader.next_plan()
    assert plan is not None
    assert submit(2) == 8  # before anybody knows
    ranks.leader.handle_result(step_pb2.StepResult(slots=[0], token_ids=[0], not_finite=[0]))
    assert submit(3) == 0
    ranks.leader.check_integrity()
    second = ranks.leader.next_plan()
    assert second is not None and [chunk.new_tokens for chunk in second.chunks] == [4, 12]
    ranks.leader.handle_result(step_pb2.StepResult(step_id=second.step_id, slots=[1, 0], token_ids=[5, 6]))
    assert not [sequence for sequence in ranks.leader.sequences() if sequence.finish_reason == "failed"]
    ranks.leader.check_integrity()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": [1, 2, 50]}, "token id 50 has no embedding: ids are 0 to 49"),
        ({"output_ids": [99]}, "token id 99"),
        ({"probe": control_pb2.Probe(forced_ids=[7, 51])}, "token id 51"),
        ({"prompt_ids": []}, "no token to begin with"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2**31}, "shorten it"),
    ],
)
def test_what_would_break_ranks_is_refused_alone_before_a_step_is_planned(
    changes: dict[str, object], words: str
) -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(kv_tokens=96, page_size=4), vocab_size=50)
    fields = {"request_id": 1, "prompt_ids": [1, 2], "max_new_tokens": 2, **changes}
    sound = control_pb2.Submit(request_id=2, prompt_ids=[49], max_new_tokens=1)
    for submit in (control_pb2.Submit(**fields), sound):  # type: ignore[arg-type]
        leader.handle(control_pb2.ToReplica(submit=submit))
    refused = [event.refused for event in leader.take_events() if event.WhichOneof("event") == "refused"]
    assert [item.request_id for item in refused] == [1] and words in refused[0].message
    plan = leader.next_plan()
    assert plan is not None and [join.request_id for join in plan.joins] == [2]


def test_a_start_that_would_break_ranks_is_refused_and_gives_its_reservation_back() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(kv_tokens=96, page_size=4), vocab_size=50)
    leader.handle(control_pb2.ToReplica(reserve=control_pb2.Reserve(request_id=1, prompt_tokens=3, max_new_tokens=4)))
    leader.handle(
        control_pb2.ToReplica(start=control_pb2.Start(request_id=1, prompt_ids=[1], output_ids=[50], max_new_tokens=3))
    )
    assert [event.WhichOneof("event") for event in leader.take_events()][:2] == ["reserved", "refused"]
    assert leader.is_idle
    leader.check_integrity()


def test_pages_that_were_found_wrong_are_found_by_nobody_whoever_computed_them_and_whenever_it_is_seen() -> None:
    """The first is aborted before its own flag comes, the second finds its pages and is flagged for it, the third has
    ended by a stop token when the step behind it is flagged.
    """
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=8, max_sequences=3, kv_tokens=96)
    leader = Leader(shape=shape, settings=settings_)

    def submit(request_id: int, prompt_ids: range, *, new: int = 2) -> int:
        message = control_pb2.Submit(
            request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=new, stop_token_ids=[STOP]
        )
        leader.handle(control_pb2.ToReplica(submit=message))
        admitted = [event.admitted for event in leader.take_events() if event.WhichOneof("event") == "admitted"]
        return admitted[-1].cached_tokens

    def answer(plan: step_pb2.StepPlan | None, *, tokens: list[int], is_finite: bool = True) -> None:
        assert plan is not None
        slots = [chunk.slot for chunk in plan.chunks if chunk.sample]
        not_finite = [] if is_finite else slots
        result = step_pb2.StepResult(step_id=plan.step_id, slots=slots, token_ids=tokens, not_finite=not_finite)
        leader.handle_result(result)

    assert submit(1, range(20)) == 0
    plan = leader.next_plan()
    leader.handle(control_pb2.ToReplica(abort=control_pb2.Abort(request_id=1)))
    answer(plan, tokens=[])
    assert submit(2, range(12)) == 8
    answer(leader.next_plan(), tokens=[0], is_finite=False)
    assert submit(3, range(12)) == 0
    first, second = leader.next_plan(), leader.next_plan()  # 8 and 4 of its tokens
    third = None
    answer(first, tokens=[])
    third = leader.next_plan()
    answer(second, tokens=[STOP])
    answer(third, tokens=[0], is_finite=False)
    assert submit(4, range(12)) == 0
    leader.check_integrity()
