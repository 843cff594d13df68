"""The dispatcher over real leaders, with a network between them that delivers when the test says so."""

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.topology import Placement, ReplicaPlan
from proto import control_pb2, step_pb2
from router.dispatcher import Dispatcher
from router.errors import OverloadedError
from router.generation import FailedEvent, FinishedEvent, Generation, GenerationRequest, TokensEvent
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

    def __init__(self, pool: str, *, seed: int) -> None:
        place = Placement(host="here", device=0)
        self.plan = ReplicaPlan(pool=pool, index=0, shape=SHAPE, engine=SETTINGS[pool], placements=(place,))
        self.epoch = 1
        self.load = control_pb2.Load()
        self.leader = Leader(shape=SHAPE, settings=SETTINGS[pool])
        self._random = random.Random(seed)
        self._inbox: deque[control_pb2.ToReplica] = deque()
        self._outbox: deque[control_pb2.FromReplica] = deque()
        self._handing_off: dict[int, int] = {}

    @property
    def name(self) -> str:
        return self.plan.name

    def send(self, message: control_pb2.ToReplica) -> None:
        self._inbox.append(message)

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
        plan = self.leader.next_plan()
        if plan is None:
            return False
        for join in plan.joins:
            self._handing_off.pop(join.slot, None)
            if join.HasField("target"):
                self._handing_off[join.slot] = join.request_id
        slots = [chunk.slot for chunk in plan.chunks if chunk.sample]
        tokens = [self._random.randint(0, 9) for _ in slots]
        self.leader.handle_result(step_pb2.StepResult(step_id=plan.step_id, slots=slots, token_ids=tokens))
        for chunk in plan.chunks:
            if chunk.slot in self._handing_off:
                self.leader.handle_writes(step_pb2.WritesDone(request_id=self._handing_off[chunk.slot]))
        self._collect()
        return True

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


VERBS = ("submit", "submit", "take", "take", "take", "tell", "tell", "tell", "step", "step", "abort")


@settings(max_examples=300, deadline=None)
@given(
    verbs=st.lists(st.sampled_from(VERBS), max_size=120),
    is_disaggregated=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_whatever_crosses_on_the_way_every_generation_ends_once_and_nothing_is_held(
    verbs: list[str], is_disaggregated: bool, seed: int
) -> None:
    chance = random.Random(seed)
    pools = ("prefill", "decode") if is_disaggregated else ("unified",)
    replicas = [DistantReplica(pool, seed=seed) for pool in pools]
    dispatcher = Dispatcher(max_waiting=8)
    dispatcher.set_replicas(replicas)
    dispatcher.open()
    generations: list[Generation] = []
    clients: list[Client] = []
    for verb in verbs:
        replica = chance.choice(replicas)
        if verb == "submit":
            request = GenerationRequest(
                prompt_ids=tuple(range(chance.randint(1, 44))),  # the longest fit no prefill pool
                max_new_tokens=chance.randint(1, 4),
                stop_token_ids=frozenset({STOP}),
                sampling=control_pb2.Sampling(),
            )
            try:
                generations.append(dispatcher.submit(request))
            except OverloadedError:
                continue
            clients.append(Client(generations[-1]))
        elif verb == "abort" and generations:
            dispatcher.abort(chance.choice(generations))
        elif verb == "take":
            replica.take()
        elif verb == "tell":
            replica.tell(dispatcher)
        else:
            replica.step()
        for client in clients:
            client.read()
    while any([*(r.take() for r in replicas), *(r.tell(dispatcher) for r in replicas), *(r.step() for r in replicas)]):
        pass
    assert dispatcher.num_held == 0
    for replica in replicas:
        assert replica.leader.is_idle
        replica.leader.check_integrity()
    for client, generation in zip(clients, generations, strict=True):
        client.read()
        assert client.end, "a client waits for ever"
        if client.end == "length":
            assert len(client.token_ids) == generation.request.max_new_tokens


def test_a_refusal_that_crosses_an_abort_leaves_nothing_held() -> None:
    prefill, decode = DistantReplica("prefill", seed=0), DistantReplica("decode", seed=0)
    # The router would refuse it at once; the leader still has the last word.
    decode.leader = Leader(shape=SHAPE, settings=EngineSettings(page_size=4, kv_tokens=8))
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
