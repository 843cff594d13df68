"""Leads each generation through the pools: prefill, a reservation in decode, the hand-off, decode, and every early end.

```
Submit -> prefill      WantTarget <- prefill      Reserve -> decode      Reserved <- decode      Target -> prefill
tokens <- prefill      HandoffDone <- prefill     Start -> decode        tokens, Ended <- decode
```
In a unified pool, or for a single token, the first step is all. A reservation is given back only after prefill has said
that it writes nothing any more.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import defaultdict
from collections.abc import Sequence

from parallel.admission import WARM_UP_NEW_TOKENS, WARM_UP_PROMPT_TOKENS, check_fits
from proto import control_pb2
from router.errors import (
    ClusterError,
    HandoffFailedError,
    InvalidRequestError,
    ModelFailedError,
    OverloadedError,
)
from router.generation import FailedEvent, FinishedEvent, Generation, GenerationRequest
from router.replica import Replica

logger = logging.getLogger(__name__)

_PROBE_SAMPLING = control_pb2.Sampling(temperature=0, top_p=1)
_RETRY_S = 1.0
#: How long a hand-off that failed may wait for a cause: a writer sees its target's end before the router is told.
_CAUSE_GRACE_S = 1.0
#: Source and target, each a replica in an epoch.
_Pair = tuple[tuple[str, int], tuple[str, int]]


class Dispatcher:
    """All generations of a router. All its methods belong to one event loop."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._generations: dict[int, Generation] = {}
        self._replicas: list[Replica] = []
        self._held_tokens: dict[str, int] = defaultdict(int)  # by replica, what its generations may come to hold
        self._quarantined: dict[_Pair, list[int]] = defaultdict(list)  # requests
        self._num_waiting = 0
        self._closed: Exception | None = None
        self._is_closed = asyncio.Event()
        self._is_open = False

    def set_replicas(self, replicas: Sequence[Replica]) -> None:
        """The replicas that probes may use, and clients after `open`."""
        self._replicas = list(replicas)

    def open(self) -> None:
        """Serves clients from now on."""
        self._is_open = True

    @property
    def replicas(self) -> Sequence[Replica]:
        """The replicas that serve."""
        return self._replicas

    @property
    def num_held(self) -> int:
        """Generations of which some replica holds something."""
        return len(self._generations)

    def held_tokens(self, replica: Replica) -> int:
        """Tokens that the generations on `replica` may come to hold there: of prompts alone where it hands them off."""
        return self._held_tokens[replica.name]

    def _hold(self, generation: Generation, *, on: Replica) -> None:
        self._held_tokens[on.name] += _tokens_on(generation, on)

    def submit(self, request: GenerationRequest) -> Generation:
        """Starts a generation; OverloadedError where too many wait, ClusterError where nothing serves."""
        if self._closed is not None:
            raise self._closed
        if not self._is_open:
            raise ClusterError("the router is starting: no replica serves yet")
        self._check_fits(request)
        if self._num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{self._num_waiting} requests are waiting, limits.max_waiting is {self._max_waiting}: try again later",
                retry_s=_RETRY_S,
            )
        entry = self._pool("prefill") or self._pool("unified")
        replica = min(entry, key=lambda item: (self.held_tokens(item), item.plan.index))
        return self._start(request, replica=replica, handoff=replica.plan.pool == "prefill")

    def abort(self, generation: Generation) -> None:
        """Ends a generation for its client at once, and on every replica as soon as nothing writes for it."""
        generation.finish("abort")
        if generation.is_aborted:
            return
        generation.is_aborted = True
        holder = generation.prefill or generation.decode
        if holder is not None:
            abort = control_pb2.Abort(request_id=generation.request_id)
            holder.send(control_pb2.ToReplica(abort=abort))

    def fail_all(self, error: Exception) -> None:
        """Ends every generation with `error`, and refuses new ones with it."""
        self._closed = error
        self._is_closed.set()
        for generation in self._generations.values():
            generation.fail(error)
        self._generations.clear()
        self._held_tokens.clear()
        self._num_waiting = 0

    async def cause(self, error: Exception) -> Exception:
        """What a client should be told of `error`: the cluster's end, where a failed hand-off was its first sign."""
        if isinstance(error, HandoffFailedError):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_closed.wait(), _CAUSE_GRACE_S)
            return self._closed or error
        return error

    def fail_on(self, replica: Replica, error: Exception) -> None:
        """`replica` is gone in its epoch with all that it held: what was there fails, and ends where else it is."""
        for generation in list(self._generations.values()):
            if generation.prefill is replica or generation.decode is replica:
                generation.fail(error)
                if generation.decode is replica:
                    generation.is_handed_off = True  # there is nobody left to release its pages
                elif generation.decode is not None and not generation.is_handed_off:
                    self._quarantine(generation, source=replica, target=generation.decode)
                self._let_go(generation, replica)
                self.abort(generation)
        for pair in [pair for pair in self._quarantined if pair[1] == (replica.name, replica.epoch)]:
            del self._quarantined[pair]

    async def probe(self, replica: Replica, *, target: Replica | None = None) -> None:
        """Sends real tokens through `replica`, and by hand-off to `target` where given; ClusterError on refusal."""
        num_tokens = 1 if replica.plan.pool == "prefill" and target is None else WARM_UP_NEW_TOKENS
        prompt_ids = tuple(range(WARM_UP_PROMPT_TOKENS))
        request = GenerationRequest(
            prompt_ids=prompt_ids, max_new_tokens=num_tokens, stop_token_ids=frozenset(), sampling=_PROBE_SAMPLING
        )
        generation = self._start(request, replica=replica, handoff=target is not None)
        generation.wanted_decode = target
        while True:
            event = await generation.events.get()
            if isinstance(event, FailedEvent):
                raise ClusterError(f"{replica.name} refused its first token: {event.error}")
            if isinstance(event, FinishedEvent):
                return

    def on_events(self, replica: Replica, message: control_pb2.FromReplica) -> None:
        """Takes what a leader says. What it says of a generation that is unknown is late and changes nothing."""
        for event in message.events:
            kind = event.WhichOneof("event")
            if kind == "load":
                replica.load.CopyFrom(event.load)
            elif kind == "peer_answered":
                continue  # of the replica itself, not of a generation
            elif kind == "tokens":
                self._on_tokens(event.tokens)
            else:
                body = getattr(event, str(kind))
                generation = self._generations.get(body.request_id)
                if generation is not None:
                    getattr(self, f"_on_{kind}")(generation, replica, body)

    # ---- events, by name ----

    def _on_tokens(self, tokens: control_pb2.Tokens) -> None:
        grouped: dict[int, list[int]] = defaultdict(list)
        for request_id, token_id in zip(tokens.request_ids, tokens.token_ids, strict=True):
            grouped[request_id].append(token_id)
        for request_id, token_ids in grouped.items():
            generation = self._generations.get(request_id)
            if generation is not None:
                generation.add_tokens(token_ids)

    def _on_want_target(self, generation: Generation, _: Replica, __: control_pb2.WantTarget) -> None:
        if generation.is_aborted:
            return
        generation.decode = generation.wanted_decode or max(self._pool("decode"), key=self._room)
        self._hold(generation, on=generation.decode)
        reserve = control_pb2.Reserve(
            request_id=generation.request_id,
            prompt_tokens=len(generation.request.prompt_ids),
            max_new_tokens=generation.request.max_new_tokens,
        )
        generation.decode.send(control_pb2.ToReplica(reserve=reserve))

    def _on_reserved(self, generation: Generation, replica: Replica, reserved: control_pb2.Reserved) -> None:
        if generation.is_aborted or generation.prefill is None:
            return  # given back when prefill has ended
        target = control_pb2.Target(
            request_id=generation.request_id,
            replica=replica.name,
            epoch=replica.epoch,
            dp=reserved.dp,
            pages=reserved.pages,
        )
        generation.prefill.send(control_pb2.ToReplica(target=target))

    def _on_admitted(self, generation: Generation, _: Replica, admitted: control_pb2.Admitted) -> None:
        self._num_waiting -= not generation.is_admitted
        generation.is_admitted = True
        generation.cached_tokens = admitted.cached_tokens
        generation.clock.admitted_s = generation.clock.now()

    def _on_handoff_done(self, generation: Generation, _: Replica, done: control_pb2.HandoffDone) -> None:
        generation.clock.handed_off_s = generation.clock.now()
        generation.handoff_bytes, generation.handoff_write_s = done.bytes, done.seconds
        if generation.is_aborted or generation.decode is None:
            return
        request = generation.request
        start = control_pb2.Start(
            request_id=generation.request_id,
            prompt_ids=request.prompt_ids,
            output_ids=generation.token_ids,
            max_new_tokens=request.max_new_tokens - len(generation.token_ids),
            stop_token_ids=sorted(request.stop_token_ids),
            sampling=request.sampling,
            probe=control_pb2.Probe(
                forced_ids=request.probe.forced_ids[len(generation.token_ids) :], logits=request.probe.logits
            ),
        )
        generation.decode.send(control_pb2.ToReplica(start=start))
        generation.is_handed_off = True

    def _on_ended(self, generation: Generation, replica: Replica, ended: control_pb2.Ended) -> None:
        if replica is generation.prefill and generation.decode is not None and not generation.is_handed_off:
            if ended.writes_may_land:
                self._quarantine(generation, source=replica, target=generation.decode)
            else:
                _release(generation.request_id, on=generation.decode)
        if ended.reason not in ("handoff", "failed"):
            generation.finish(ended.reason)
        self._let_go(generation, replica)

    def _on_failed(self, generation: Generation, replica: Replica, failed: control_pb2.Failed) -> None:
        """Its client hears at once; what replicas hold of it comes back with `Ended`."""
        message = f"{replica.name}: {failed.message}"
        if failed.kind == control_pb2.FAILURE_KIND_HANDOFF:
            target = generation.decode.name if generation.decode else "no replica"
            generation.fail(HandoffFailedError(f"{message} (handing its KV to {target})"))
        else:
            generation.fail(ModelFailedError(message))
        generation.is_aborted = True  # there is nothing left to abort

    def _quarantine(self, generation: Generation, *, source: Replica, target: Replica) -> None:
        """Bytes of a write that failed may wait in the target's sockets: its pages are used again only when that side
        has closed the writer.
        """
        logger.warning(
            "target pages stay out of use: request_id=%016x source=%s target=%s",
            *(generation.request_id, source.name, target.name),
        )
        self._quarantined[_pair(source, target)].append(generation.request_id)

    def release_quarantined(self, source: Replica, target: Replica) -> None:
        """`target` has closed the writer `source`: what failed hand-offs between them kept may be used again."""
        for request_id in self._quarantined.pop(_pair(source, target), []):
            _release(request_id, on=target)

    def _on_refused(self, generation: Generation, replica: Replica, refused: control_pb2.Refused) -> None:
        generation.fail(InvalidRequestError(f"{replica.name}: {refused.message}"))
        self._let_go(generation, replica)
        self.abort(generation)

    def _let_go(self, generation: Generation, replica: Replica) -> None:
        """`replica` holds nothing of it any more; where no other does either, it is over."""
        self._held_tokens[replica.name] -= _tokens_on(generation, replica)
        if replica is generation.prefill:
            generation.prefill = None
        else:
            generation.decode = None
        if generation.prefill is None and generation.decode is None:
            self._num_waiting -= not generation.is_admitted
            del self._generations[generation.request_id]

    def _on_logits(self, generation: Generation, _: Replica, logits: control_pb2.Logits) -> None:
        generation.logits.append(logits.float32)

    # ---- small parts ----

    def _check_fits(self, request: GenerationRequest) -> None:
        """InvalidRequestError for what no replica could ever hold, before it waits for anything."""
        for pool in ("prefill", "decode", "unified"):
            for replica in self._pool(pool)[:1]:  # the replicas of a pool are alike
                try:
                    check_fits(
                        prompt_tokens=len(request.prompt_ids),
                        max_new_tokens=0 if pool == "prefill" else request.max_new_tokens,
                        settings=replica.plan.engine,
                        cp=replica.plan.shape.attention.cp,
                    )
                except ValueError as error:
                    raise InvalidRequestError(str(error)) from None

    def _start(self, request: GenerationRequest, *, replica: Replica, handoff: bool) -> Generation:
        generation = Generation(request_id=secrets.randbits(64), request=request, prefill=replica)
        self._generations[generation.request_id] = generation
        self._hold(generation, on=replica)
        self._num_waiting += 1
        submit = control_pb2.Submit(
            request_id=generation.request_id,
            prompt_ids=request.prompt_ids,
            max_new_tokens=request.max_new_tokens,
            stop_token_ids=sorted(request.stop_token_ids),
            sampling=request.sampling,
            handoff=handoff and request.max_new_tokens > 1,
            probe=request.probe,
        )
        replica.send(control_pb2.ToReplica(submit=submit))
        return generation

    def _pool(self, name: str) -> list[Replica]:
        return [replica for replica in self._replicas if replica.plan.pool == name]

    def _room(self, replica: Replica) -> tuple[int, int]:
        """How much more a decode replica may take: its capacity less what generations there may come to hold."""
        shape, engine = replica.plan.shape, replica.plan.engine
        capacity = engine.kv_tokens * shape.attention.cp * shape.attention.dp
        return capacity - self.held_tokens(replica), -replica.plan.index


def _pair(source: Replica, target: Replica) -> _Pair:
    return (source.name, source.epoch), (target.name, target.epoch)


def _release(request_id: int, *, on: Replica) -> None:
    on.send(control_pb2.ToReplica(release=control_pb2.Release(request_id=request_id)))


def _tokens_on(generation: Generation, replica: Replica) -> int:
    """Tokens that `generation` may come to hold on `replica`."""
    request = generation.request
    return len(request.prompt_ids) if replica.plan.pool == "prefill" else request.num_tokens
