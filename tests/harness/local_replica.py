"""A replica whose ranks are threads of this process: the real leader, runners and gloo groups, without launchers.

For what only has to see the step path: other kernels behind it, one layer's sums, a wrong part put in on purpose.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch._C._distributed_c10d import HashStore

from attention.interface import AttentionBackend, AttentionSpec
from parallel.collectives.communicator import CollectiveClock
from parallel.collectives.groups import Rendezvous, build_groups
from parallel.model_share import ModelShare
from parallel.models.registry import describe_checkpoint
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from proto import control_pb2, step_pb2
from worker.engine.leader import Leader
from worker.handoff.layer_wise import NoHandOff
from worker.kernels.interface import Kernels
from worker.kernels.torch_kernels import TorchKernels
from worker.kv_memory import allocate_kv
from worker.rank_model import build_model
from worker.step.runner import ModelRunner

MakeBackend = Callable[[AttentionSpec], AttentionBackend]


class LocalReplica:
    """The ranks of `shape` over the checkpoint in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        shape: ReplicaShape,
        settings: EngineSettings,
        make_backend: MakeBackend,
        kernels: Kernels | None = None,
    ) -> None:
        description = describe_checkpoint(folder)
        self._shape = shape
        self._leader = Leader(shape=self._shape, settings=settings, groups=description.cache_groups)
        self._store = HashStore()
        self.cached_tokens: dict[int, int] = {}
        self._ranks = ThreadPoolExecutor(self._shape.world_size)
        barrier = threading.Barrier(self._shape.world_size)

        def build(rank: int) -> ModelRunner:
            barrier.wait(timeout=30)
            coordinates = self._shape.coordinates(rank)
            clock = CollectiveClock()
            groups = build_groups(
                self._shape,
                global_rank=rank,
                order=self._shape.creation_order_of(rank),
                rendezvous=Rendezvous(
                    store=self._store,
                    device=torch.device("cpu"),
                    host_address="127.0.0.1",
                    build_timeout_s=30,
                    timeout_s=30,
                ),
                clock=clock,
            )
            share = ModelShare(description=description, shape=self._shape, coordinates=coordinates)
            memory = allocate_kv(share.storage(settings), device=torch.device("cpu"))
            model = build_model(
                folder,
                share,
                settings=settings,
                kernels=kernels or TorchKernels(),
                groups=groups,
                memory=memory,
                make_backend=make_backend,
                progress=lambda _: None,
            )
            return ModelRunner(
                model,
                global_rank=rank,
                clock=clock,
                hand_off=NoHandOff(),
            )

        self.runners = list(self._ranks.map(build, range(self._shape.world_size)))

    def run(self, submits: Sequence[control_pb2.Submit]) -> dict[int, list[npt.NDArray[np.float32]]]:
        """Runs all until they end; returns the logits of each that asked for them, by request id."""
        for submit in submits:
            self._leader.handle(control_pb2.ToReplica(submit=submit))
        self.cached_tokens = {}
        logits: dict[int, list[npt.NDArray[np.float32]]] = {submit.request_id: [] for submit in submits}
        while plans := self._next_plans():
            own = [
                [step[self._shape.coordinates(rank).attn_dp_rank] for step in plans]
                for rank in range(len(self.runners))
            ]
            for results in self._ranks.map(self._steps, self.runners, own):
                for result in results:
                    self._leader.handle_result(result)
            for event in self._leader.take_events():
                assert event.WhichOneof("event") != "refused", event
                if event.WhichOneof("event") == "admitted":
                    self.cached_tokens[event.admitted.request_id] = event.admitted.cached_tokens
                if event.WhichOneof("event") == "logits":
                    logits[event.logits.request_id].append(np.frombuffer(event.logits.float32, dtype=np.float32))
        assert self._leader.is_idle
        self._leader.check_integrity()
        return logits

    def close(self) -> None:
        """Ends the ranks' threads."""
        self._ranks.shutdown()

    def _next_plans(self) -> list[list[step_pb2.StepPlan]]:
        """By step and dp coordinate, as many steps as may be in flight, as in a real replica."""
        plans = []
        while self._leader.can_plan and (plan := self._leader.next_plan()) is not None:
            plans.append(plan)
        return plans

    @staticmethod
    def _steps(runner: ModelRunner, plans: Sequence[step_pb2.StepPlan]) -> list[step_pb2.StepResult]:
        return [runner.run(plan)() for plan in plans]
