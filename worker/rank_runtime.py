"""One rank under one assignment: built from it, run by the main thread, closed before the next."""

import queue
from collections.abc import Callable
from functools import partial
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from attention.select import create_backend
from parallel.checkpoint import fingerprint, resolve_model
from parallel.collectives.communicator import CollectiveClock
from parallel.collectives.groups import Rendezvous, build_groups
from parallel.handoff import cache_layout
from parallel.model_share import ModelShare
from parallel.models.registry import describe_checkpoint
from parallel.wire import check_assignment, settings_from_wire, shape_from_wire
from proto import control_pb2, step_pb2
from worker.device import ResultSender, torch_device
from worker.handoff.layer_wise import HandOff, LayerWiseHandOff, NoHandOff
from worker.handoff.plan import HandoffSource, SourceMemory
from worker.handoff.thread import HandoffThread
from worker.handoff.transport.interface import MemoryRegion
from worker.handoff.transport.nixl import NixlTransport
from worker.kv_memory import KvMemory, allocate_kv
from worker.leader_thread import LeaderThread
from worker.rank_model import build_model, resolve_dtype
from worker.star import LeaderStar, MemberStar
from worker.step.rows import SequenceTables
from worker.step.runner import ModelRunner

Inbox = queue.SimpleQueue[Any]


class RankRuntime:
    """Groups, weights, KV memory, star and, on rank 0, the leader. Everything in it belongs to one epoch."""

    def __init__(
        self,
        assignment: control_pb2.AssignRequest,
        *,
        global_rank: int,
        store: Any,
        inbox: Inbox,
        tell_launcher: Callable[[control_pb2.FromRank], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Blocking, collective over the replica: ValueError where the assignment contradicts itself or the model."""
        given = next(rank for rank in assignment.ranks if rank.global_rank == global_rank)
        self._assignment = assignment
        self._inbox = inbox
        self._tell_launcher = tell_launcher
        self._fail = fail
        self._shape = shape_from_wire(assignment.sizes)
        self._settings = settings_from_wire(assignment.engine)
        self._coordinates = check_assignment(self._shape, given)
        self._device = torch_device(assignment.device_kind, index=given.device)
        self._clock = CollectiveClock()
        self._results = ResultSender(self._device, fail=fail)
        self._endpoint = b""
        self._groups = self._build_groups(given, store)
        self._build_model()
        self._leader: LeaderThread | None = None
        self._star = self._join_star(store)

    @property
    def endpoint(self) -> bytes:
        """What a hand-off peer needs to write here."""
        return self._endpoint

    def to_leader(self, message: control_pb2.ToReplica) -> None:
        """Hands a message of the router to the leader; ValueError where this rank is not it. A stale one is dropped."""
        if message.epoch != self._assignment.epoch:
            return
        if self._leader is None:
            raise ValueError(f"rank {self._coordinates.global_rank} of {self._assignment.replica} is not its leader")
        self._leader.put(message)

    def handle(self, message: step_pb2.ToMember) -> None:
        """Takes one message of the leader: runs a step, or makes a hand-off peer known."""
        if message.WhichOneof("message") == "peer":
            assert self._handoff is not None, "a unified pool has no peers"
            self._handoff.connect(message.peer)
            return
        result = self._runner.run(message.plan)
        self._results.put(lambda: self._star.send(step_pb2.FromMember(result=result())))

    def close(self) -> None:
        """Ends threads and connections; idempotent."""
        if self._leader is not None:
            self._leader.close()
        self._results.close()
        self._star.close()
        self._groups.close()
        if self._handoff is not None:
            self._handoff.close()

    def _build_groups(self, given: control_pb2.RankAssignment, store: Any) -> Any:
        self._progress("groups", 0.0)
        return build_groups(
            self._shape,
            global_rank=given.global_rank,
            order=[tuple(group.ranks) for group in given.groups],
            rendezvous=Rendezvous(
                store=PrefixStore("groups", store),
                device=self._device,
                host_address=self._assignment.host_address,
                build_timeout_s=self._assignment.start_timeout_s,
                # The leader's step deadline comes first: it knows which ranks are silent, a collective does not.
                timeout_s=2 * self._settings.step_timeout_s,
            ),
            clock=self._clock,
        )

    def _build_model(self) -> None:
        settings, folder = self._settings, resolve_model(self._assignment.model)
        share = ModelShare(description=describe_checkpoint(folder), shape=self._shape, coordinates=self._coordinates)
        kernel = settings.attention_kernel
        memory = allocate_kv(share, settings=settings, dtype=resolve_dtype(settings.dtype), device=self._device)
        model = build_model(
            folder,
            share,
            settings=settings,
            groups=self._groups,
            memory=memory,
            make_backend=partial(create_backend, kind=None if kernel == "auto" else kernel),
            progress=lambda fraction: self._progress("weights", fraction),
        )
        self._memory = memory
        self._handoff = None if self._assignment.pool == "unified" else self._build_handoff(share, memory)
        self._runner = ModelRunner(
            model,
            tables=SequenceTables(
                shape=self._shape,
                coordinates=self._coordinates,
                settings=settings,
            ),
            global_rank=self._coordinates.global_rank,
            cp=self._groups["attn_cp"],
            clock=self._clock,
            hand_off=self._hand_off(),
        )

    def _build_handoff(self, share: ModelShare, memory: KvMemory) -> HandoffThread:
        region = MemoryRegion(
            address=memory.region.data_ptr(),
            num_bytes=memory.region.nbytes,
            layer_bytes=memory.layer_bytes,
            device=None if self._device.type == "cpu" else self._device.index,
        )
        transport = NixlTransport(region)
        self._endpoint = transport.endpoint().SerializeToString()
        return HandoffThread(
            transport,
            source=HandoffSource(
                share=share,
                layout=cache_layout(share.description, shape=self._shape, page_size=self._settings.page_size),
                memory=SourceMemory(
                    base_address=region.address,
                    layer_bytes=region.layer_bytes,
                    element_bytes=memory.region.element_size(),
                    token_elements=share.description.head_dim,
                ),
            ),
            receives=self._assignment.pool == "decode",
            report=lambda done: self._star.send(step_pb2.FromMember(writes=done)),
            fail=self._fail,
        )

    def _hand_off(self) -> HandOff:
        if self._handoff is None or self._assignment.pool != "prefill":
            return NoHandOff()
        region = self._memory.region
        return LayerWiseHandOff(
            send=self._handoff.send,
            num_layers=len(region),
            token_bytes=region[0, 0].nbytes // self._settings.page_size,
            coordinate=self._coordinates.attn_cp_rank,
            device=self._device,
        )

    def _join_star(self, store: Any) -> LeaderStar | MemberStar:
        join = step_pb2.Join(
            global_rank=self._coordinates.global_rank, epoch=self._assignment.epoch, secret=self._assignment.secret
        )
        timeout_s = self._assignment.start_timeout_s

        def deliver_own(message: step_pb2.ToMember) -> None:
            if message.WhichOneof("message") == "where":
                self._tell_whereabouts()  # not by the main thread, which may hang
            else:
                self._inbox.put((self, message))

        if self._coordinates.global_rank != 0:
            return MemberStar(store=store, join=join, timeout_s=timeout_s, deliver=deliver_own)

        def deliver(message: step_pb2.FromMember) -> None:
            assert self._leader is not None
            self._leader.put(message)

        star = LeaderStar(
            store=store,
            address=self._assignment.host_address,
            join=join,
            world_size=self._shape.world_size,
            timeout_s=timeout_s,
            deliver=deliver,
            deliver_own=deliver_own,
        )
        self._leader = LeaderThread(
            shape=self._shape,
            settings=self._settings,
            revision=fingerprint(resolve_model(self._assignment.model)).encode(),
            broadcast=star.broadcast,
            tell_router=lambda events: self._tell_launcher(control_pb2.FromRank(replica=events)),
            fail=self._fail,
        )
        return star

    def _tell_whereabouts(self) -> None:
        whereabouts = step_pb2.Whereabouts(
            global_rank=self._coordinates.global_rank, in_collective=self._clock.is_inside
        )
        self._star.send(step_pb2.FromMember(whereabouts=whereabouts))

    def _progress(self, phase: str, fraction: float) -> None:
        progress = control_pb2.RankProgress(global_rank=self._coordinates.global_rank, phase=phase, fraction=fraction)
        self._tell_launcher(control_pb2.FromRank(progress=progress))
