"""The dispatcher over real leaders, with a network between them that delivers when the test says so."""

import asyncio
import contextlib
import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.page_columns import column
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.topology import Placement, ReplicaPlan
from proto import control_pb2, step_pb2
from router.dispatcher import Dispatcher
from router.errors import ClusterError, HandoffFailedError, OverloadedError
from router.generation import FailedEvent, FinishedEvent, Generation, GenerationRequest, TokensEvent
from tests.harness.cache_groups import FULL
from worker.engine.leader import Leader

STOP = 3
SHAPE = ReplicaShape(attention=AttentionSizes(), experts=None)
#: Of the two pools the prefill one is the smaller, so that both make requests wait and refuse some.
SETTINGS = {
    "prefill": EngineSettings(page_size=4, max_batch_tokens=6, max_sequences=2, kv_tokens=40),
    "decode": EngineSettings(page_size=4, max_batch_tokens=8, max_sequences=2, kv_tokens=48),
    "unified": EngineSettings(page_size=4, max_batch_tokens=6, max_sequences=2, kv_tokens=48),
}


class DistantReplica:
    """A leader whose messages, to it and from it, wait in order until they are delivered; its ranks draw at random."""

    def __init__(self, pool: str, *, seed: int, index: int = 0, faults: float = 0.0) -> None:
        place = Placement(host="here", device=0)
        # The router takes it for a little larger than it is: so leaders have something to refuse too.
        engine = replace(SETTINGS[pool], kv_tokens=48)
        self.plan = ReplicaPlan(pool=pool, index=index, shape=SHAPE, engine=engine, placements=(place,))
        self.epoch = 1
        self.load = control_pb2.Load()
        self.leader = Leader(shape=SHAPE, settings=SETTINGS[pool], groups=FULL)
        self.faults = faults
        self._random = random.Random(seed)
        self._inbox: deque[control_pb2.ToReplica] = deque()
        self._outbox: deque[control_pb2.FromReplica] = deque()
        self._handing_off: dict[int, int] = {}
        self.started: set[int] = set()

    @property
    def name(self) -> str:
        return self.plan.name

    def send(self, message: control_pb2.ToReplica) -> None:
        self._inbox.append(message)
        if message.WhichOneof("message") == "start":
            self.started.add(message.start.request_id)

    def take(self) -> bool:
        """The leader gets the next message; False where there is none."""
        if self._inbox:
            self.leader.handle(self._inbox.popleft())
            self._collect()
            return True
        return False

    def tell(self, dispatcher: Dispatcher) -> bool:
        """The dispatcher gets the leader's next events; False where there are none."""
        if self._outbox:
            dispatcher.on_events(self, self._outbox.popleft())
            return True
        return False

    def step(self) -> bool:
        """Runs a step and, of what it handed off, the writes; False where there is nothing to run."""
        plans = self.leader.next_plan()
        if plans is None:
            return False
        (plan,) = plans
        for join in plan.joins:
            self._handing_off.pop(join.slot, None)
            if join.HasField("target"):
                self._handing_off[join.slot] = join.request_id
        slots = [*column(plan.decode_slots).tolist(), *(prompt.slot for prompt in plan.prompts if prompt.sample)]
        result = step_pb2.StepResult(step_id=plan.step_id, slots=slots)
        result.token_ids.extend(self._random.randint(0, 9) for _ in slots)
        result.not_finite.extend(slot for slot in slots if self._happens())
        self.leader.handle_result(result)
        for prompt in plan.prompts:
            if prompt.slot in self._handing_off:
                self._write(self._handing_off[prompt.slot])
        self._collect()
        return True

    def _write(self, request_id: int) -> None:
        """A chunk's writes end; some fail, and of those some may still land."""
        has_failed = self._happens()
        if has_failed:
            self.leader.handle_writes_failed(step_pb2.WritesFailed(request_id=request_id, reason="it broke off"))
        may_land = has_failed and self._random.random() < 0.5
        self.leader.handle_writes(step_pb2.WritesDone(request_id=request_id, may_land=may_land))

    def _happens(self) -> bool:
        return self._random.random() < self.faults

    def _collect(self) -> None:
        events = self.leader.take_events()
        if events:
            self._outbox.append(control_pb2.FromReplica(events=events))


class Client:
    """Reads one generation and sees that it ends once, with nothing after."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self.token_ids: list[int] = []
        self.end = ""

    def read(self) -> None:
        events = self._generation.events
        while not events.empty():
            event = events.get_nowait()
            assert not self.end, f"{event} after {self.end}"
            if isinstance(event, TokensEvent):
                self.token_ids += event.token_ids
            elif isinstance(event, FinishedEvent):
                self.end = event.reason
            elif isinstance(event, FailedEvent):
                self.end = f"failed: {event.error}"


class Service:
    """A dispatcher, its replicas and its clients, of whom any may act next."""

    def __init__(self, pools: tuple[str, ...], *, seed: int, faults: float = 0.0) -> None:
        self.replicas = [DistantReplica(pool, seed=seed, faults=faults) for pool in pools]
        self.dispatcher = Dispatcher(max_waiting=8)
        self.dispatcher.set_replicas(self.replicas)
        self.dispatcher.open()
        self.generations: list[Generation] = []
        self.clients: list[Client] = []
        self._chance = random.Random(seed)
        self._never_started: set[int] = set()

    def act(self, verb: str) -> None:
        replica = self._chance.choice(self.replicas)
        if verb == "submit":
            self._submit()
        elif verb == "abort" and self.generations:
            self.abort(self._chance.choice(self.generations))
        elif verb == "take":
            replica.take()
        elif verb == "tell":
            replica.tell(self.dispatcher)
        else:
            replica.step()
        for client in self.clients:
            client.read()

    def settle(self) -> None:
        """Delivers and runs everything until nothing is left, and sees that nothing is held."""
        for _ in range(2 + len(self.generations)):  # what is released lets others go on, which may fail too
            run_until_quiet(self.replicas, self.dispatcher)
            self.dispatcher.release_quarantined(self.replicas[0], self.replicas[-1])
        assert self.dispatcher.num_held == 0
        assert not any(self.dispatcher.held_tokens(replica) for replica in self.replicas)
        for replica in self.replicas:
            assert not replica.started & self._never_started, "decode started on what was aborted before"
            assert replica.leader.is_idle
            replica.leader.check_integrity()

    def _submit(self) -> None:
        request = GenerationRequest(
            prompt_ids=tuple(range(self._chance.randint(1, 44))),  # the longest fit no prefill pool
            max_new_tokens=self._chance.randint(1, 4),
            stop_token_ids=frozenset({STOP}),
            sampling=control_pb2.Sampling(),
        )
        with contextlib.suppress(OverloadedError):
            self.generations.append(self.dispatcher.submit(request))
            self.clients.append(Client(self.generations[-1]))

    def abort(self, generation: Generation) -> None:
        """A client goes."""
        self.dispatcher.abort(generation)
        if not any(generation.request_id in replica.started for replica in self.replicas):
            self._never_started.add(generation.request_id)


def run_until_quiet(replicas: list[DistantReplica], dispatcher: Dispatcher) -> None:
    while any([*(r.take() for r in replicas), *(r.tell(dispatcher) for r in replicas), *(r.step() for r in replicas)]):
        pass


VERBS = ("submit", "submit", "take", "take", "take", "tell", "tell", "tell", "step", "step", "abort")


@settings(max_examples=300, deadline=None)
@given(
    verbs=st.lists(st.sampled_from(VERBS), max_size=120),
    is_disaggregated=st.booleans(),
    faults=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10_000),
)
def test_whatever_crosses_on_the_way_every_generation_ends_once_and_nothing_is_held(
    verbs: list[str], is_disaggregated: bool, faults: float, seed: int
) -> None:
    service = Service(("prefill", "decode") if is_disaggregated else ("unified",), seed=seed, faults=faults)
    for verb in verbs:
        service.act(verb)
    service.settle()
    for client, generation in zip(service.clients, service.generations, strict=True):
        client.read()
        assert client.end, "a client waits for ever"
        if client.end == "length":
            assert len(client.token_ids) == generation.request.max_new_tokens


def test_a_refusal_that_crosses_an_abort_leaves_nothing_held() -> None:
    prefill, decode = DistantReplica("prefill", seed=0), DistantReplica("decode", seed=0)
    # The router would refuse it at once; the leader still has the last word.
    decode.leader = Leader(shape=SHAPE, settings=EngineSettings(page_size=4, kv_tokens=8), groups=FULL)
    dispatcher = Dispatcher(max_waiting=8)
    dispatcher.set_replicas([prefill, decode])
    dispatcher.open()
    request = GenerationRequest(
        prompt_ids=tuple(range(20)), max_new_tokens=4, stop_token_ids=frozenset(), sampling=control_pb2.Sampling()
    )
    generation = dispatcher.submit(request)
    assert prefill.take() and prefill.tell(dispatcher)  # it wants a target
    assert decode.take()  # the refusal is on its way
    dispatcher.abort(generation)
    assert prefill.take() and prefill.tell(dispatcher)  # prefill has ended
    assert decode.tell(dispatcher) and decode.take()
    assert dispatcher.num_held == 0


@pytest.mark.parametrize("num_delivered", range(9))
def test_decode_never_starts_on_what_was_aborted_before(num_delivered: int) -> None:
    service = Service(("prefill", "decode"), seed=0)
    prefill, decode = service.replicas
    request = GenerationRequest(
        prompt_ids=(1, 2, 3), max_new_tokens=4, stop_token_ids=frozenset(), sampling=control_pb2.Sampling()
    )
    service.generations.append(service.dispatcher.submit(request))
    way = (
        prefill.take,
        lambda: prefill.tell(service.dispatcher),  # WantTarget
        decode.take,
        lambda: decode.tell(service.dispatcher),  # Reserved
        prefill.take,
        lambda: prefill.tell(service.dispatcher),  # Admitted
        prefill.step,  # HandoffDone and Ended are on their way
        lambda: True,
    )
    for deliver in way[:num_delivered]:
        assert deliver()
    service.abort(service.generations[0])
    service.settle()
    assert not decode.started


def test_requests_are_spread_over_replicas_by_the_tokens_that_they_hold_there() -> None:
    replicas = [DistantReplica("unified", seed=0, index=index) for index in range(3)]
    dispatcher = Dispatcher(max_waiting=100)
    dispatcher.set_replicas(replicas)
    dispatcher.open()

    def submit(prompt_tokens: int) -> str:
        request = GenerationRequest(
            prompt_ids=tuple(range(prompt_tokens)),
            max_new_tokens=1,
            stop_token_ids=frozenset(),
            sampling=control_pb2.Sampling(),
        )
        generation = dispatcher.submit(request)
        assert generation.prefill is not None
        return generation.prefill.name

    assert [submit(tokens) for tokens in (30, 10, 10, 10, 10)] == [f"unified/{index}" for index in (0, 1, 2, 1, 2)]
    run_until_quiet(replicas, dispatcher)
    assert [submit(10) for _ in range(3)] == [f"unified/{index}" for index in range(3)]


def handed_off(service: Service) -> Generation:
    """A generation whose KV is on its way from prefill to decode."""
    prefill, decode = service.replicas
    request = GenerationRequest(
        prompt_ids=(1, 2, 3), max_new_tokens=4, stop_token_ids=frozenset(), sampling=control_pb2.Sampling()
    )
    generation = service.dispatcher.submit(request)
    for replica in (prefill, decode, prefill):
        assert replica.take() and replica.tell(service.dispatcher)
    return generation


def test_a_prefill_replica_holds_the_prompts_that_it_hands_off_and_decode_the_outputs_too() -> None:
    service = Service(("prefill", "decode"), seed=0)
    handed_off(service)
    assert [service.dispatcher.held_tokens(replica) for replica in service.replicas] == [3, 7]


@pytest.mark.parametrize("may_land", [False, True])
def test_target_pages_of_a_write_that_may_still_land_are_used_again_when_the_writer_is_closed(may_land: bool) -> None:
    service = Service(("prefill", "decode"), seed=0)
    prefill, decode = service.replicas
    generation = handed_off(service)
    plans = prefill.leader.next_plan()
    assert plans is not None
    result = step_pb2.StepResult(step_id=plans[0].step_id, slots=[0], token_ids=[7])
    prefill.leader.handle_result(result)
    failed = step_pb2.WritesFailed(request_id=generation.request_id, reason="it broke off")
    prefill.leader.handle_writes_failed(failed)
    prefill._collect()
    run_until_quiet(service.replicas, service.dispatcher)
    client = Client(generation)
    client.read()
    assert client.end == "failed: prefill/0: rank 0: it broke off (handing its KV to decode/0)"
    assert service.dispatcher.num_held == 1, "prefill's own pages may still be read"
    prefill.leader.handle_writes(step_pb2.WritesDone(request_id=generation.request_id, may_land=may_land))
    prefill._collect()
    run_until_quiet(service.replicas, service.dispatcher)
    assert service.dispatcher.num_held == int(may_land)
    assert decode.leader.is_idle is not may_land
    service.settle()


def test_what_a_prefill_replica_was_writing_to_decode_stays_reserved_until_decode_has_closed_it() -> None:
    service = Service(("prefill", "decode"), seed=0)
    prefill, decode = service.replicas
    generation = handed_off(service)
    service.dispatcher.fail_on(prefill, ClusterError("it is gone"))
    run_until_quiet([decode], service.dispatcher)
    client = Client(generation)
    client.read()
    assert client.end == "failed: it is gone"
    assert service.dispatcher.num_held == 1 and not decode.leader.is_idle
    service.dispatcher.release_quarantined(prefill, decode)
    run_until_quiet([decode], service.dispatcher)
    assert service.dispatcher.num_held == 0 and decode.leader.is_idle


def test_nothing_is_kept_out_of_use_at_a_decode_replica_that_is_gone() -> None:
    service = Service(("prefill", "decode"), seed=0)
    prefill, decode = service.replicas
    generation = handed_off(service)
    service.dispatcher.fail_on(decode, ClusterError("it is gone"))
    run_until_quiet([prefill], service.dispatcher)
    client = Client(generation)
    client.read()
    assert client.end == "failed: it is gone"
    assert service.dispatcher.num_held == 0 and prefill.leader.is_idle


@pytest.mark.parametrize(
    "error, told",
    [
        (HandoffFailedError("its target disconnected"), "rank 0 of decode/0 was killed"),
        (OverloadedError("too many wait", retry_s=1), "too many wait"),
    ],
)
def test_a_hand_off_that_failed_because_its_target_died_is_told_as_the_death_of_its_target(
    error: Exception, told: str
) -> None:
    async def ends() -> Exception:
        dispatcher = Dispatcher(max_waiting=1)
        cause = asyncio.ensure_future(dispatcher.cause(error))
        await asyncio.sleep(0.05)  # the writer sees the end of a connection before the router hears of a death
        dispatcher.fail_all(ClusterError("rank 0 of decode/0 was killed"))
        return await cause

    assert str(asyncio.run(ends())) == told


def test_a_hand_off_that_failed_alone_is_told_as_itself() -> None:
    error = HandoffFailedError("it broke off")
    assert asyncio.run(Dispatcher(max_waiting=1).cause(error)) is error
