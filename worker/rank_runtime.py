"""One rank under one assignment: built from it, run by the main thread, closed before the next."""

import queue
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from attention.select import create_backend
from native.library import NativeLibrary
from parallel.checkpoint.fingerprint import fingerprint
from parallel.checkpoint.location import resolve_model
from parallel.collectives.communicator import CollectiveClock
from parallel.collectives.groups import GroupMemories, RankGroups, Rendezvous, build_groups
from parallel.link import DEVICES
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.models.registry import describe_checkpoint
from parallel.process.cores import available_cores
from parallel.stage_cost import stage_costs
from parallel.storage_wire import storage_to_wire
from parallel.wire import check_assignment, settings_from_wire, shape_from_wire
from proto import control_pb2, step_pb2
from worker.device import ResultSender, torch_device
from worker.engine.pipeline_choice import Host, PipelineChoice, choose_pipeline
from worker.handoff.layer_wise import HandOff, LayerWiseHandOff, NoHandOff
from worker.handoff.plan import HandoffSource
from worker.handoff.receiver import HandoffReceiver
from worker.handoff.sender import HandoffSender
from worker.handoff.transport.interface import MemoryRegion
from worker.handoff.transport.nixl import NixlSource, NixlTarget
from worker.kernels.choose import choose_library, load_library, make_kernels
from worker.kv_memory import KvMemory, allocate_kv
from worker.leader_thread import LeaderThread
from worker.rank_model import build_model
from worker.star import LeaderStar, MemberStar
from worker.step.runner import ModelRunner

Inbox = queue.SimpleQueue[Any]


def store_prefix(assignment: control_pb2.AssignRequest) -> str:
    """The part of the replica's store that belongs to its epoch."""
    return f"{assignment.replica}/{assignment.epoch}"


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
        shared_groups: Sequence[control_pb2.SharedGroup] = (),
    ) -> None:
        """Blocking, collective over the replica: ValueError where the assignment contradicts itself or the model.

        `shared_groups` are those of its groups that meet in the launcher's memory.
        """
        given = next(rank for rank in assignment.ranks if rank.global_rank == global_rank)
        self._assignment = assignment
        self._inbox = inbox
        self._tell_launcher = tell_launcher
        self._fail = fail
        self._shape = shape_from_wire(assignment.sizes)
        self._settings = settings_from_wire(assignment.engine)
        self._coordinates = check_assignment(self._shape, given)
        self._machine_cores = given.cores.machine_cores
        self._device = torch_device(assignment.device_kind, index=given.device)
        self._clock = CollectiveClock()
        self._is_closed = False
        self._results = ResultSender(self._device, fail=fail)
        self._groups: RankGroups | None = None
        self._handoff: HandoffSender | HandoffReceiver | None = None
        self._runner: ModelRunner | None = None
        self._leader: LeaderThread | None = None
        self._star: LeaderStar | MemberStar | None = None
        try:
            memories = self._group_memories(shared_groups, spins=given.cores.spins)
            self._groups = self._build_groups(given, store, memories)
            folder = resolve_model(assignment.model)
            description = describe_checkpoint(folder)
            loaded = None if memories is None else memories.library
            self._runner = self._build_runner(self._groups, folder, description, loaded=loaded)
            self._star = self._join_star(store, folder=folder, description=description)
        except BaseException:  # raised on: what is half built must not outlive this either
            self.close()
            raise

    def to_leader(self, message: control_pb2.ToReplica) -> None:
        """Hands a message of the router to the leader; ValueError where this rank is not it. A stale one is dropped."""
        leader = self._leader  # once: the main thread may be closing this
        if message.epoch != self._assignment.epoch or self._is_closed:
            return
        if leader is None:
            raise ValueError(f"rank {self._coordinates.global_rank} of {self._assignment.replica} is not its leader")
        leader.put(message)

    def handle(self, message: step_pb2.ToMember) -> None:
        """Takes one message of the leader: runs a step, or hands on an order about a hand-off's other side."""
        if message.WhichOneof("message") == "peer_order":
            assert self._handoff is not None, "a unified pool has no peers"
            self._handoff.take(message.peer_order)
            return
        assert self._runner is not None
        result = self._runner.run(message.plan)
        self._results.put(lambda: self._report(step_pb2.FromMember(result=result())))

    def close(self) -> None:
        """Ends threads and connections, and gives up all that the epoch held; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        # The hand-off before the star: it still reports what it finishes.
        for part in (self._leader, self._results, self._handoff, self._star, self._groups):
            if part is not None:
                part.close()
        # What these were given refers back to this object: they end here, and not when a circle is found.
        self._leader = self._groups = self._handoff = self._runner = None

    def _report(self, message: step_pb2.FromMember) -> None:
        assert self._star is not None
        self._star.send(message)

    def _build_groups(
        self, given: control_pb2.RankAssignment, store: Any, memories: GroupMemories | None
    ) -> RankGroups:
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
            memories=memories,
        )

    def _group_memories(self, shared_groups: Sequence[control_pb2.SharedGroup], *, spins: bool) -> GroupMemories | None:
        if not shared_groups:
            return None
        return GroupMemories(
            paths={tuple(group.ranks): group.path for group in shared_groups},
            library=load_library(),
            spins=spins,
        )

    def _build_runner(
        self, groups: RankGroups, folder: Path, description: ModelDescription, *, loaded: NativeLibrary | None
    ) -> ModelRunner:
        settings = self._settings
        share = ModelShare(description=description, shape=self._shape, coordinates=self._coordinates)
        kernel = settings.attention_kernel
        library = choose_library(settings.kernels, device=self._device, dtype=settings.dtype, loaded=loaded)
        memory = allocate_kv(share.storage(settings), device=self._device)
        model = build_model(
            folder,
            share,
            settings=settings,
            kernels=make_kernels(library),
            groups=groups,
            memory=memory,
            make_backend=partial(create_backend, kind=None if kernel == "auto" else kernel, library=library),
            progress=lambda fraction: self._progress("weights", fraction),
        )
        self._handoff = self._build_handoff(share, memory)
        return ModelRunner(
            model,
            global_rank=self._coordinates.global_rank,
            clock=self._clock,
            hand_off=self._hand_off(share),
        )

    def _build_handoff(self, share: ModelShare, memory: KvMemory) -> HandoffSender | HandoffReceiver | None:
        """What writes, of a prefill pool; what is written to, of a decode pool."""
        region = MemoryRegion(
            address=memory.region.data_ptr(),
            num_bytes=memory.region.nbytes,
            device=None if self._device.type == "cpu" else self._device.index,
            groups=storage_to_wire(memory.storage),
        )
        if self._assignment.pool == "unified":
            return None
        if self._assignment.pool == "decode":
            return HandoffReceiver(
                NixlTarget(region),
                global_rank=self._coordinates.global_rank,
                device=self._device,
                report=self._report,
                fail=self._fail,
            )
        return HandoffSender(
            NixlSource(region),
            source=HandoffSource(share=share, storage=memory.storage, base_address=region.address),
            write_timeout_s=self._settings.step_timeout_s,
            device=self._device,
            report=self._report,
            fail=self._fail,
        )

    def _hand_off(self, share: ModelShare) -> HandOff:
        if not isinstance(self._handoff, HandoffSender):
            return NoHandOff()
        return LayerWiseHandOff(
            send=self._handoff.send,
            num_layers=len(share.layers),
            token_bytes=-(-sum(share.token_bytes(self._settings).values()) // len(share.layers)),
            device=self._device,
        )

    def _join_star(self, store: Any, *, folder: Path, description: ModelDescription) -> LeaderStar | MemberStar:
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
            leader = self._leader
            if leader is not None:  # a late word of a member whose epoch has ended here
                leader.put(message)

        star = LeaderStar(
            store=store,
            address=self._assignment.host_address,
            join=join,
            dp_ranks=self._shape.dp_ranks,
            timeout_s=timeout_s,
            deliver=deliver,
            deliver_own=deliver_own,
        )
        self._leader = LeaderThread(
            shape=self._shape,
            settings=self._settings,
            groups=description.cache_groups,
            vocab_size=description.vocab_size,
            revision=fingerprint(folder).encode(),
            pipeline=self._pipeline_choice(description),
            broadcast=star.broadcast,
            send_plans=star.send_plans,
            tell_router=lambda events: self._tell_launcher(control_pb2.FromRank(replica=events)),
            fail=self._fail,
        )
        return star

    def _pipeline_choice(self, description: ModelDescription) -> PipelineChoice:
        """That of the leader, from what its own host holds of the replica."""
        is_cpu, num_ranks = self._device.type == "cpu", len(self._assignment.ranks)
        return choose_pipeline(
            self._settings.pipeline,
            stages=stage_costs(description, shape=self._shape, settings=self._settings),
            stage_size=self._shape.stage_size,
            host=Host(
                speed=DEVICES[self._device.type],
                # Not what this process may use: it may be kept to one node, and the replica's ranks are on all.
                units=(self._machine_cores or available_cores()) if is_cpu else num_ranks,
                units_per_rank=torch.get_num_threads() if is_cpu else 1,
                num_ranks=num_ranks,
            ),
        )

    def _tell_whereabouts(self) -> None:
        whereabouts = step_pb2.Whereabouts(
            global_rank=self._coordinates.global_rank, in_collective=self._clock.is_inside
        )
        self._report(step_pb2.FromMember(whereabouts=whereabouts))

    def _progress(self, phase: str, fraction: float) -> None:
        progress = control_pb2.RankProgress(global_rank=self._coordinates.global_rank, phase=phase, fraction=fraction)
        self._tell_launcher(control_pb2.FromRank(progress=progress))
