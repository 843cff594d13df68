"""The leader over simulated ranks: random requests, early ends, late answers, and pages proven at every step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from tests.engine.simulated_ranks import STOP, SimulatedRanks
from tests.harness.cache_groups import FULL, full_group, window_group
from worker.engine.leader import Leader
from worker.engine.pipeline_choice import FixedParts


def only(plans: list[step_pb2.StepPlan] | None) -> step_pb2.StepPlan:
    """The plan of the one dp coordinate."""
    assert plans is not None
    (plan,) = plans
    return plan


def drawing_slots(plan: step_pb2.StepPlan) -> list[int]:
    """The slots that draw a token in a step."""
    return [*column(plan.decode_slots).tolist(), *(prompt.slot for prompt in plan.prompts if prompt.sample)]


def prompt(chance: random.Random) -> list[int]:
    """Up to 30 tokens; many begin alike."""
    first = [chance.randint(0, 1)] * chance.choice((4, 8, 9))
    return [*first, *range(chance.randint(0, 20))]


class ChangingParts:
    """Chooses another number of parts each time: what is planned must not depend on what was chosen before."""

    def __init__(self, *, most: int, seed: int) -> None:
        self._most = most
        self._random = random.Random(seed)

    def num_parts(self, *, rows: int, context: float) -> int:
        """See PipelineChoice."""
        assert rows > 0 and context > 0
        return self._random.randint(1, self._most)


VERBS = ("submit", "submit", "plan", "plan", "plan", "answer", "answer", "write", "targets", "start", "abort")
#: Windows shorter and longer than a page, a zigzag block and a prompt; 0 sees everything.
WINDOWS = st.sampled_from([(0,), (0, 1), (0, 3), (5, 0), (0, 8), (0, 17), (0, 40), (2, 9), (6,), (10,)])
POOLS = st.sampled_from(["prefill", "decode", "unified"])


@settings(max_examples=200, deadline=None)
@given(
    verbs=st.lists(st.sampled_from(VERBS), max_size=80),
    dp=st.integers(1, 2),
    cp=st.integers(1, 4),
    pp=st.integers(1, 3),
    pool=POOLS,
    windows=WINDOWS,
    faults=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_whatever_happens_every_page_returns_and_every_request_ends_once(
    verbs: list[str], dp: int, cp: int, pp: int, pool: str, windows: tuple[int, ...], faults: float, seed: int
) -> None:
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=cp), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=10, max_sequences=3, kv_tokens=48)
    ranks = SimulatedRanks(
        shape=shape,
        settings=settings_,
        groups=groups_of(windows),
        seed=seed,
        faults=faults,
        pipeline=ChangingParts(most=pp, seed=seed),
    )
    live(ranks, verbs, pool=pool, chance=random.Random(seed))


@settings(max_examples=150, deadline=None)
@given(
    cp=st.integers(1, 4),
    pp=st.integers(1, 2),
    pool=POOLS,
    windows=st.sampled_from([(6,), (2, 9), (10,), (0, 7)]),
    batch=st.integers(1, 30),
    seed=st.integers(0, 100_000),
)
def test_a_long_life_of_a_pool_that_is_full_ends_too(
    cp: int, pp: int, pool: str, windows: tuple[int, ...], batch: int, seed: int
) -> None:
    """Windows whose shares are nearly all that there is: chunks are cut, and wait."""
    chance = random.Random(seed)
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(cp=cp), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=batch, max_sequences=6, kv_tokens=chance.choice([48, 56]))
    ranks = SimulatedRanks(shape=shape, settings=settings_, groups=groups_of(windows), seed=seed)
    submits = ["submit"] * chance.randint(2, 6)
    live(ranks, [*submits, *chance.choices(VERBS, k=100)], pool=pool, chance=chance)


def live(ranks: SimulatedRanks, verbs: list[str], *, pool: str, chance: random.Random) -> None:
    """Lets all that happen and everything end, and proves what clients were told."""
    submitted: dict[int, int] = {}
    for verb in verbs:
        if verb == "submit":
            request_id = len(submitted) + 1
            submitted[request_id] = chance.randint(2, 12)
            ask(ranks, pool, request_id=request_id, prompt_ids=prompt(chance), max_new_tokens=submitted[request_id])
        elif verb == "abort" and submitted:
            end_early(ranks, chance.choice(list(submitted)))
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
            assert len(tokens) == ranks.most_tokens[request_id]
        elif reason == "handoff":
            assert len(tokens) == 1
        assert (reason == "failed") is (request_id in ranks.failed)


def ask(ranks: SimulatedRanks, pool: str, *, request_id: int, prompt_ids: list[int], max_new_tokens: int) -> None:
    """A request as it comes to that pool."""
    if pool == "decode":
        ranks.reserve(request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens)
        return
    submit = control_pb2.Submit(
        request_id=request_id,
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_token_ids=[STOP],
        handoff=pool == "prefill",
    )
    ranks.submit(submit)


def end_early(ranks: SimulatedRanks, request_id: int) -> None:
    """Nobody wants it any more, and nobody writes to what was reserved for it."""
    ranks.leader.handle(control_pb2.ToReplica(abort=control_pb2.Abort(request_id=request_id)))
    ranks.leader.handle(control_pb2.ToReplica(release=control_pb2.Release(request_id=request_id)))
    ranks.reserved.pop(request_id, None)
    ranks.listen()


def groups_of(windows: tuple[int, ...]) -> list[CacheGroup]:
    """A group for each of `windows`, one that sees everything for 0."""
    return [window_group(window) if window else full_group() for window in windows]


def test_a_decode_reservation_is_named_waits_for_room_and_is_freed_by_release_only() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(page_size=4, kv_tokens=40, max_sequences=4), groups=FULL)

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
    ranks = SimulatedRanks(shape=shape, settings=settings_)
    submit = control_pb2.Submit(request_id=1, prompt_ids=range(157), max_new_tokens=2, handoff=True)
    ranks.submit(submit)
    ranks.give_targets()
    while ranks.plan():
        pass
    (sequence,) = ranks.leader.sequences()
    held = list(ranks.leader.pages_of(sequence)[0].cp_ranks)
    pages = -(-sequence.planned_tokens // 4)
    assert len(held) == pages
    assert max(held.count(index) for index in range(cp)) <= -(-pages // cp) + 2


def test_a_prompt_that_fits_an_empty_pool_is_admitted_over_a_warm_cache_too() -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=4), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=3, kv_tokens=32)
    ranks = SimulatedRanks(shape=shape, settings=settings_)
    for request_id in (1, 2, 3):
        ranks.submit(control_pb2.Submit(request_id=request_id, prompt_ids=range(88), max_new_tokens=8))
        ranks.settle()
        assert request_id in ranks.ended


def test_a_shared_first_page_does_not_draw_all_sequences_to_one_dp_coordinate() -> None:
    shape = ReplicaShape(attention=AttentionSizes(dp=4), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=64, kv_tokens=8000)
    ranks = SimulatedRanks(shape=shape, settings=settings_)
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
    leader = Leader(shape=shape, settings=EngineSettings(page_size=4, kv_tokens=40, max_sequences=4), groups=FULL)
    submit = control_pb2.Submit(request_id=1, prompt_ids=range(3), max_new_tokens=4)
    leader.handle(control_pb2.ToReplica(submit=submit))
    first, second = only(leader.next_plan()), only(leader.next_plan())

    def answer(plan: step_pb2.StepPlan, *, rank: int, tokens: tuple[int, ...] = ()) -> list[int]:
        slots = drawing_slots(plan)[: len(tokens)]
        leader.handle_result(step_pb2.StepResult(step_id=plan.step_id, global_rank=rank, slots=slots, token_ids=tokens))
        return [token for event in leader.take_events() for token in event.tokens.token_ids]

    assert answer(first, rank=1) == []
    assert answer(second, rank=1, tokens=(8,)) == []
    assert answer(first, rank=0, tokens=(7,)) == [7, 8]
    assert answer(second, rank=0) == []


def test_a_half_written_page_of_an_aborted_prompt_is_not_found() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=10, max_sequences=3, kv_tokens=400)
    ranks = SimulatedRanks(shape=shape, settings=settings_)
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
    ranks = SimulatedRanks(shape=shape, settings=settings_)
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
    leader = Leader(shape=shape, settings=settings_, groups=FULL)
    for request_id in range(1, 6):
        submit = control_pb2.Submit(request_id=request_id, prompt_ids=range(3), max_new_tokens=30)
        leader.handle(control_pb2.ToReplica(submit=submit))
    assert leader.next_plan() is not None  # the prompts
    decode = [only(leader.next_plan()) for _ in range(2)]
    slots = [sorted(drawing_slots(plan)) for plan in decode]
    # All five are in the prompts' step too, and in no more than one beside it.
    assert [len(part) for part in slots] == [3, 2]
    assert len({*slots[0], *slots[1]}) == 5


class GivenParts:
    """As many parts as the test says."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def num_parts(self, *, rows: int, context: float) -> int:
        """See PipelineChoice."""
        return self.parts


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_batch_in_other_parts_than_before_soon_has_even_ones_and_every_sequence_its_turn(
    dp: int, cp: int, pp: int, before: int, after: int
) -> None:
    shape = ReplicaShape(pp=pp, attention=AttentionSizes(dp=dp, cp=cp), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=200, max_sequences=12, kv_tokens=4000)
    pipeline = GivenParts(min(before, pp))
    ranks = SimulatedRanks(shape=shape, settings=settings_, pipeline=pipeline)
    for request_id in range(12 * dp):
        ranks.submit(control_pb2.Submit(request_id=request_id, prompt_ids=[request_id, 1], max_new_tokens=200))

    def turns(count: int) -> list[list[set[int]]]:
        """The slots of so many steps by dp coordinate, each planned as soon as it may be, as the oldest is answered."""
        found: list[list[set[int]]] = []
        while len(found) < count:
            while plans := ranks.plan():
                found.append([set(column(plan.decode_slots).tolist()) for plan in plans])
            oldest = ranks.leader.oldest_step
            while ranks.leader.oldest_step == oldest or (ranks.leader.oldest_step or (0,))[0] == (oldest or (0,))[0]:
                ranks.answer()
            ranks.listen()
        return found

    turns(8)
    pipeline.parts = parts = min(after, pp)
    turns(2 * pp + 2)  # those of the parts before come together
    later = turns(4 * parts)
    for number in range(len(later) - parts + 1):
        for of_dp in range(dp):
            round_ = [step[of_dp] for step in later[number : number + parts]]
            assert set.union(*round_) == set(range(12)), "each has its turn in every round"
            assert all(len(step) <= -(-12 // cp // parts) * cp for step in round_), "parts are even"


def test_prompts_that_are_left_go_through_all_stages_whatever_decode_does() -> None:
    shape = ReplicaShape(pp=3, attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=16, max_sequences=4, kv_tokens=400)
    ranks = SimulatedRanks(shape=shape, settings=settings_, pipeline=FixedParts(parts=1))
    ranks.submit(control_pb2.Submit(request_id=1, prompt_ids=[1], max_new_tokens=40))
    assert [ranks.plan() is not None for _ in range(3)] == [True, True, False]
    ranks.submit(control_pb2.Submit(request_id=2, prompt_ids=range(64), max_new_tokens=4))
    assert [ranks.plan() is not None for _ in range(3)] == [True, True, False]


def test_a_reservation_that_waits_is_not_overtaken_by_smaller_ones() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(page_size=4, kv_tokens=40, max_sequences=4), groups=FULL)
    for request_id, tokens in ((1, 24), (2, 28), (3, 4)):
        reserve = control_pb2.Reserve(request_id=request_id, prompt_tokens=tokens, max_new_tokens=4)
        leader.handle(control_pb2.ToReplica(reserve=reserve))
    named = [event.reserved.request_id for event in leader.take_events() if event.HasField("reserved")]
    assert named == [1]  # of ten pages three are left: room for the third, but the second is before it


def test_what_a_sequence_without_numbers_computed_is_found_by_nobody_and_read_on_by_those_that_had_found_it() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    settings_ = EngineSettings(page_size=4, max_batch_tokens=64, max_sequences=3, kv_tokens=96)
    ranks = SimulatedRanks(shape=shape, settings=settings_)

    def submit(request_id: int) -> int:
        """Returns how many of its tokens were cached."""
        ranks.prompts[request_id] = tuple(range(12))
        message = control_pb2.Submit(request_id=request_id, prompt_ids=range(12), max_new_tokens=2)
        ranks.leader.handle(control_pb2.ToReplica(submit=message))
        events = ranks.leader.take_events()
        return next(event.admitted.cached_tokens for event in events if event.WhichOneof("event") == "admitted")

    assert submit(1) == 0
    assert ranks.leader.next_plan() is not None
    assert submit(2) == 8  # before anybody knows
    ranks.leader.handle_result(step_pb2.StepResult(slots=[0], token_ids=[0], not_finite=[0]))
    assert submit(3) == 0
    ranks.leader.check_integrity()
    second = only(ranks.leader.next_plan())
    assert [len(column(prompt.token_ids)) for prompt in second.prompts] == [4, 12]
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
    leader = Leader(shape=shape, settings=EngineSettings(kv_tokens=96, page_size=4), groups=FULL, vocab_size=50)
    fields = {"request_id": 1, "prompt_ids": [1, 2], "max_new_tokens": 2, **changes}
    sound = control_pb2.Submit(request_id=2, prompt_ids=[49], max_new_tokens=1)
    for submit in (control_pb2.Submit(**fields), sound):  # type: ignore[arg-type]
        leader.handle(control_pb2.ToReplica(submit=submit))
    refused = [event.refused for event in leader.take_events() if event.WhichOneof("event") == "refused"]
    assert [item.request_id for item in refused] == [1] and words in refused[0].message
    assert [join.request_id for join in only(leader.next_plan()).joins] == [2]


def test_a_start_that_would_break_ranks_is_refused_and_gives_its_reservation_back() -> None:
    shape = ReplicaShape(attention=AttentionSizes(), experts=None)
    leader = Leader(shape=shape, settings=EngineSettings(kv_tokens=96, page_size=4), groups=FULL, vocab_size=50)
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
    leader = Leader(shape=shape, settings=settings_, groups=FULL)

    def submit(request_id: int, prompt_ids: range, *, new: int = 2) -> int:
        message = control_pb2.Submit(
            request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=new, stop_token_ids=[STOP]
        )
        leader.handle(control_pb2.ToReplica(submit=message))
        admitted = [event.admitted for event in leader.take_events() if event.WhichOneof("event") == "admitted"]
        return admitted[-1].cached_tokens

    def answer(plans: list[step_pb2.StepPlan] | None, *, tokens: list[int], is_finite: bool = True) -> None:
        plan = only(plans)
        slots = drawing_slots(plan)
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
