"""Groups with a window: what a sequence holds of them, takes from them, finds in them and is given in another pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.admission import longest_sequence
from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import CacheGroup
from proto import control_pb2, step_pb2
from tests.engine.simulated_ranks import SimulatedRanks
from tests.harness.cache_groups import full_group, window_group
from worker.engine.leader import Leader
from worker.engine.pages import DpPages
from worker.engine.prefix_cache import CachedPage

PAGE = 4
ONE = ReplicaShape(attention=AttentionSizes(), experts=None)


def ranks(*, window: int, kv_tokens: int = 48, batch: int = 64, cp: int = 1) -> SimulatedRanks:
    """Ranks of a model with one group, which has a window."""
    settings = EngineSettings(page_size=PAGE, max_batch_tokens=batch, max_sequences=6, kv_tokens=kv_tokens)
    shape = ReplicaShape(attention=AttentionSizes(cp=cp), experts=None)
    return SimulatedRanks(shape=shape, settings=settings, groups=[window_group(window)])


def submit(running: SimulatedRanks, request_id: int, tokens: int, *, new: int = 9, handoff: bool = False) -> None:
    """A prompt that begins with a token of its own."""
    prompt_ids = [1000 + request_id, *range(tokens - 1)]
    running.submit(
        control_pb2.Submit(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=new, handoff=handoff)
    )


def chunk(running: SimulatedRanks) -> list[int]:
    """Plans a step and returns how long its prompts' chunks are."""
    plans = running.plan()
    return [] if plans is None else [len(column(prompt.token_ids)) for prompt in plans[0].prompts]


def first_held(running: SimulatedRanks) -> int:
    """The first page that the one sequence holds."""
    (sequence,) = running.leader.sequences()
    return running.leader.pages_of(sequence)[0].first_page


def test_what_lies_behind_a_window_returns_when_the_step_has_finished_that_saw_it_last() -> None:
    running = ranks(window=6, batch=8)
    submit(running, 1, 16)
    assert chunk(running) == [8] and chunk(running) == [8]
    assert first_held(running) == 0
    running.answer()
    assert first_held(running) == 0  # a query at 8 sees 3 and what comes after it
    running.answer()
    assert first_held(running) == 2  # one at 16 sees 11 and what comes after it
    for end, before, after in ((17, 2, 3), (18, 3, 3), (19, 3, 3), (20, 3, 3), (21, 3, 4), (22, 4, 4)):
        assert running.plan()
        assert first_held(running) == before
        running.answer()
        assert first_held(running) == after == (end - 6 + 1) // PAGE


def test_a_chunk_is_cut_to_the_pages_that_nobody_else_was_promised() -> None:
    running = ranks(window=6)  # four pages are promised to each of three, which are all there are
    for request_id in (1, 2, 3):
        submit(running, request_id, 28)
    assert chunk(running) == [16, 16, 16]
    assert running.plan() is None  # and none is left until the step has finished
    running.answer()
    assert chunk(running) == [8, 8, 8]
    running.answer()
    assert chunk(running) == [4, 4, 4]


def test_a_prompt_whose_last_window_is_still_written_elsewhere_does_not_keep_others_from_theirs() -> None:
    running = ranks(window=6)
    for request_id in (1, 2):
        submit(running, request_id, 32, handoff=True)
    running.give_targets()
    submit(running, 3, 32)
    while running.plan():
        running.answer_all()
        running.listen()
    assert running.ended == {3: "length"}  # while not one write has ended
    held = [len(running.leader.pages_of(sequence)[0].pages) for sequence in running.leader.sequences()]
    assert held == [2, 2]
    running.settle()
    assert running.ended.keys() == {1, 2, 3}


def test_a_decoding_sequence_waits_for_a_page_that_its_prompt_still_holds() -> None:
    running = ranks(window=6)
    for request_id in (1, 2, 3):
        submit(running, request_id, 16)
    assert chunk(running) == [16, 16, 16]
    assert running.plan() is None
    running.answer()
    plans = running.plan()
    assert plans is not None and len(column(plans[0].decode_slots)) == 3
    running.settle()
    assert running.ended.keys() == {1, 2, 3}


def test_a_decoding_sequence_keeps_its_share_at_home_alone() -> None:
    running = ranks(window=6, cp=2)
    submit(running, 1, 16)
    group = running.leader._dp_states[0].pages.groups[0]
    assert group.available() == [12 - 4, 12 - 4]
    assert chunk(running) == [16]
    running.answer_all()
    (held,) = running.leader.pages_of(next(running.leader.sequences()))
    assert held.cp_ranks.tolist() == [1, 0]
    assert group.available() == [12 - 4, 12 - 1]
    running.settle()


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9, 40])
@pytest.mark.parametrize("prompt_tokens", [1, 3, 4, 5, 8, 17])
def test_a_target_names_the_pages_of_the_last_window_and_all_lie_where_the_sequence_is_at_home(
    window: int, prompt_tokens: int
) -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=3), experts=None)
    settings = EngineSettings(page_size=PAGE, max_sequences=6, kv_tokens=100)
    leader = Leader(shape=shape, settings=settings, groups=[full_group(), window_group(window)])
    for request_id in range(5):
        reserve = control_pb2.Reserve(request_id=request_id, prompt_tokens=prompt_tokens, max_new_tokens=4)
        leader.handle(control_pb2.ToReplica(reserve=reserve))
    reserved = [event.reserved for event in leader.take_events() if event.HasField("reserved")]
    assert len(reserved) == 5
    for index, item in enumerate(reserved):
        everything, seen = item.pages
        assert everything.first_page == 0 and len(column(everything.pages)) == -(-(prompt_tokens + 4) // PAGE)
        assert seen.first_page == max(0, prompt_tokens - window + 1) // PAGE
        assert seen.first_page + len(column(seen.pages)) == -(-prompt_tokens // PAGE)
        assert set(column(seen.cp_ranks).tolist()) <= {index % 3}
    leader.check_integrity()


def test_a_reservation_goes_to_a_home_that_has_room_where_the_most_even_one_has_none() -> None:
    running = ranks(window=24, cp=2)  # twelve pages on each cp rank, eight of them for a long sequence
    for request_id, prompt_tokens in ((1, 28), (2, 4), (3, 28), (4, 28)):
        running.reserve(request_id, prompt_ids=range(prompt_tokens), max_new_tokens=4)
    homes = {request_id: set(column(item.pages[0].cp_ranks)) for request_id, item in running.reserved.items()}
    assert homes == {1: {0}, 2: {1}, 3: {1}}  # and a fourth fits nowhere
    running.settle()
    assert running.ended.keys() == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("window", "first_page"),
    [(1, 4), (2, 3), (6, 2), (10, 1), (40, 0)],
)
def test_a_prefix_is_found_with_the_pages_of_its_last_window_alone(window: int, first_page: int) -> None:
    settings = EngineSettings(page_size=PAGE, max_batch_tokens=64, max_sequences=3, kv_tokens=200)
    running = SimulatedRanks(shape=ONE, settings=settings, groups=[full_group(), window_group(window)])
    prompts = {1: range(18), 2: range(18)}
    for request_id, prompt_ids in prompts.items():
        running.submit(control_pb2.Submit(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=2))
        if request_id == 1:
            running.settle()
    (sequence,) = running.leader.sequences()
    everything, seen = running.leader.pages_of(sequence)
    assert sequence.cached_tokens == 16
    assert (len(everything.pages), seen.first_page, len(seen.pages)) == (4, first_page, 4 - first_page)
    running.settle()


def test_a_prefix_is_no_longer_than_the_window_behind_it_is_there() -> None:
    """Other prompts have taken pages of the window's group alone: its last ones are what is missing."""
    settings = EngineSettings(page_size=PAGE, max_batch_tokens=64, max_sequences=1, kv_tokens=200)
    running = SimulatedRanks(shape=ONE, settings=settings, groups=[full_group(), window_group(6)])
    pages = running.leader._dp_states[0].pages
    running.submit(control_pb2.Submit(request_id=1, prompt_ids=range(80), max_new_tokens=1))
    running.settle()
    digests = list(pages.groups[0]._cache._places)
    assert pages.num_cached(digests) == 20
    cache = pages.groups[1]._cache
    for _ in range(3):  # its end goes first
        pages.groups[1].allocators[0].evict(cache.evict(0))
    gone = [place for place, digest in enumerate(digests) if not cache.has(digest)]
    assert pages.num_cached(digests) == max(
        length for length in range(21) if not {*gone} & set(range(max(0, length * 4 - 5) // 4, length))
    )
    running.leader.check_integrity()


@given(
    here=st.lists(st.tuples(*3 * [st.sampled_from([True, True, True, False])]), max_size=14),
    windows=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_a_prefix_is_the_longest_of_which_every_group_has_all_that_is_seen_behind_it(
    here: list[tuple[bool, ...]], windows: tuple[int, int]
) -> None:
    groups = [full_group(), *map(window_group, windows)]
    pages = DpPages(groups, cp=1, pp=1, settings=EngineSettings(page_size=PAGE, kv_tokens=200))
    digests = [place.to_bytes(16, "little") for place in range(len(here))]
    for place, (digest, present) in enumerate(zip(digests, here, strict=True)):
        for group, is_here in zip(pages.groups, present, strict=True):
            if is_here:
                group._cache.publish(digest, CachedPage(cp_rank=0, page=place), reader=1)

    def is_found(length: int) -> bool:
        firsts = [0, *(max(0, length * PAGE - window + 1) // PAGE for window in windows)]
        return all(here[place][number] for number, first in enumerate(firsts) for place in range(first, length))

    assert pages.num_cached(digests) == max(filter(is_found, range(len(here) + 1)))


def compute(leader: Leader, request_id: int, *, tokens: int, is_finite: bool = True) -> list[dict[int, int]]:
    """Runs a prompt of so many tokens to the one that it draws; returns by group the page at each place of its table.

    All prompts begin alike.
    """
    submit = control_pb2.Submit(request_id=request_id, prompt_ids=range(tokens), max_new_tokens=1)
    leader.handle(control_pb2.ToReplica(submit=submit))
    (sequence,) = leader.sequences()
    tables: list[dict[int, int]] = [{} for _ in leader.pages_of(sequence)]
    while (plans := leader.next_plan()) is not None:
        for table, held in zip(tables, leader.pages_of(sequence), strict=True):
            table.update(enumerate(held.pages, held.first_page))
        slots = [prompt.slot for prompt in plans[0].prompts if prompt.sample]
        not_finite = [] if is_finite else slots
        leader.handle_result(
            step_pb2.StepResult(step_id=plans[0].step_id, slots=slots, token_ids=slots, not_finite=not_finite)
        )
    leader.check_integrity()
    return tables


@pytest.mark.parametrize("groups", [[full_group()], [window_group(6)], [full_group(), window_group(6)]])
def test_no_page_of_a_broken_sequence_is_found_not_even_one_that_its_window_has_left(groups: list[CacheGroup]) -> None:
    settings = EngineSettings(page_size=PAGE, max_batch_tokens=16, max_sequences=3, kv_tokens=400)
    leader = Leader(shape=ONE, settings=settings, groups=groups)
    compute(leader, 1, tokens=64, is_finite=False)
    again = compute(leader, 2, tokens=64)
    assert all(table.keys() == set(range(16)) for table in again)  # it computed every page itself
    found = compute(leader, 3, tokens=41)
    for group, table, own in zip(groups, found, again, strict=True):
        seen = range((40 - 6 + 1) // PAGE if group.window else 0, 10)
        assert [table[place] for place in seen] == [own[place] for place in seen]
        assert min(table) == seen[0]


def test_pages_that_two_read_are_set_aside_for_the_second_when_the_first_has_moved_on() -> None:
    running = ranks(window=12, kv_tokens=40, batch=16)  # five pages for each of two sequences
    for request_id in (1, 2):
        prompt_ids = [*range(16), *range(100 * request_id, 100 * request_id + 12)]
        running.submit(control_pb2.Submit(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=2))
        if request_id == 1:
            running.plan()  # so that the second finds the first's pages while it reads them
    assert [sequence.cached_tokens for sequence in running.leader.sequences()] == [0, 16]
    running.answer_all()
    (available,) = running.leader._dp_states[0].pages.groups[0].available()
    assert available >= 0
    running.settle()
    assert running.ended.keys() == {1, 2}


def test_a_sequence_whose_window_no_rank_can_hold_is_refused_with_the_numbers() -> None:
    shape = ReplicaShape(attention=AttentionSizes(cp=4), experts=None)
    settings = EngineSettings(page_size=PAGE, kv_tokens=40)
    leader = Leader(shape=shape, settings=settings, groups=[full_group(), window_group(64)])
    for request_id, tokens in ((1, 36), (2, 37)):
        message = control_pb2.Submit(request_id=request_id, prompt_ids=range(tokens), max_new_tokens=4)
        leader.handle(control_pb2.ToReplica(submit=message))
    (refused,) = [event.refused for event in leader.take_events() if event.HasField("refused")]
    assert refused.request_id == 2
    assert (
        "37 tokens with max_new_tokens 4 needs 11 pages of 4 tokens on one rank for its window of 64" in refused.message
    )
    assert "kv_tokens 40 gives 10" in refused.message
    assert longest_sequence(settings, cp=4, groups=[full_group(), window_group(64)]) == 40
    # A window that fits bounds nothing, nor does one on a single rank.
    assert longest_sequence(settings, cp=4, groups=[full_group(), window_group(32)]) == 128
    assert longest_sequence(settings, cp=1, groups=[window_group(64)]) == 40
