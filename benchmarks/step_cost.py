"""What a decode step costs in Python: on a rank from the bytes of its plan to a planned attention, and on the leader.

Run: `python -m benchmarks.step_cost`. The real leader plans for replicas of any size, and one rank's own tables and
kernels take its plans; nothing is computed, so a replica may be larger than the machine. FlashInfer's kernels are its
double's, which is called once a step and does nothing here; on a GPU the pages are joined there, at the cost of a few
launches, where here a copy is made of each sequence's.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import cast

import torch

from attention.exchange.member import CpMember
from attention.exchange.plan import plan_exchange
from attention.flashinfer_kernel.backend import FlashInferAttentionBackend
from attention.flashinfer_kernel.library import FlashInferLibrary
from attention.interface import AttentionBackend, AttentionSpec
from attention.torch_kernel.backend import TorchAttentionBackend
from benchmarks.exchange_steps import cache_group, exchange_policy
from benchmarks.report import Report
from parallel.collectives.communicator import LocalCommunicator
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import lay_out_page
from proto import control_pb2, step_pb2
from worker.engine.leader import Leader
from worker.step.sequence_tables import SequenceTables

PAGE_SIZE = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
GROUP = cache_group(num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM)
POLICY = exchange_policy(
    num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE_SIZE, element_bytes=2
)
DEVICE = torch.device("cpu")
#: What a rank's own sequences are measured at: for each dp, and for each context in tokens.
OWN_SEQUENCES, DP_SIZES = 64, (1, 4, 16)
CONTEXT_SEQUENCES, CONTEXTS = 32, (1024, 32768, 131072)
#: Of the leader: dp, and sequences of each dp coordinate.
LEADER_DP, LEADER_SEQUENCES = 16, 128


class DecodingReplica:
    """A leader all of whose sequences decode, and one rank of dp coordinate 0."""

    def __init__(self, *, dp: int, sequences: int, context: int) -> None:
        self._shape = ReplicaShape(attention=AttentionSizes(dp=dp), experts=None)
        pages = sequences * (context + 4 * PAGE_SIZE * 64)
        self._settings = EngineSettings(
            page_size=PAGE_SIZE, max_sequences=sequences, kv_tokens=pages // PAGE_SIZE * PAGE_SIZE, prefix_cache=False
        )
        self.leader = Leader(shape=self._shape, settings=self._settings, groups=[GROUP])
        self.tables = SequenceTables(
            shape=self._shape,
            coordinates=self._shape.coordinates(0),
            settings=self._settings,
            groups=[GROUP],
            device=DEVICE,
        )
        prompt = [1] * (context - 1)
        for request_id in range(1, dp * sequences + 1):
            self._start(request_id, prompt)
        self.leader.take_events()
        self._step()  # in which all join

    def _start(self, request_id: int, prompt: Sequence[int]) -> None:
        most = 2048
        reserve = control_pb2.Reserve(request_id=request_id, prompt_tokens=len(prompt), max_new_tokens=most)
        self.leader.handle(control_pb2.ToReplica(reserve=reserve))
        start = control_pb2.Start(request_id=request_id, prompt_ids=prompt, output_ids=[1], max_new_tokens=most)
        self.leader.handle(control_pb2.ToReplica(start=start))

    def _step(self) -> None:
        plans = self.leader.next_plan()
        assert plans is not None
        self.tables.apply(plans[0])
        self.answer(plans)

    def answer(self, plans: Sequence[step_pb2.StepPlan]) -> None:
        """Every rank draws a token for each of its sequences."""
        for rank, plan in enumerate(plans):
            slots = list(memoryview(plan.decode_slots).cast("i"))
            result = step_pb2.StepResult(
                step_id=plan.step_id, global_rank=rank, slots=slots, token_ids=[7] * len(slots)
            )
            self.leader.handle_result(result)

    def plans(self) -> Iterator[tuple[bytes, Sequence[step_pb2.StepPlan]]]:
        """Step after step, what the rank receives; the next one follows when it has applied it."""
        while True:
            plans = self.leader.next_plan()
            assert plans is not None
            try:
                yield plans[0].SerializeToString(), plans
            finally:  # the last one too, whoever stops asking
                self.answer(plans)
                self.leader.take_events()

    def rank_step(self, message: bytes, backend: AttentionBackend) -> None:
        """A rank's part: its plan parsed and applied, and its attention planned."""
        rows = self.tables.apply(step_pb2.StepPlan.FromString(message)).groups[GROUP.name]
        plan_exchange(rows, member=CpMember(group=LocalCommunicator(), backend=backend, policy=POLICY, device=DEVICE))

    def rank_steps(self, backend: AttentionBackend, *, runs: int) -> Iterator[float]:
        """Seconds of a rank's steps."""
        for message, _ in islice(self.plans(), runs):
            started = time.perf_counter()
            self.rank_step(message, backend)
            yield time.perf_counter() - started

    def leader_steps(self, *, runs: int) -> Iterator[float]:
        """Seconds of the leader's part of a step: its plans, all ranks' results, what the router is told."""
        for _ in range(runs):
            started = time.perf_counter()
            plans = self.leader.next_plan()
            assert plans is not None
            planned = time.perf_counter() - started
            results = [
                step_pb2.StepResult(
                    step_id=plan.step_id,
                    global_rank=rank,
                    slots=(slots := list(memoryview(plan.decode_slots).cast("i"))),
                    token_ids=[7] * len(slots),
                )
                for rank, plan in enumerate(plans)
            ]
            started = time.perf_counter()
            for result in results:
                self.leader.handle_result(result)
            self.leader.take_events()
            yield planned + time.perf_counter() - started


class _Wrapper:
    """FlashInfer's, which plans nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def plan(self, *_: object, **__: object) -> None:
        """Takes the arrays."""


_FLASHINFER = cast(
    FlashInferLibrary,
    SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=_Wrapper, BatchPrefillWithPagedKVCacheWrapper=_Wrapper),
)


def backends() -> dict[str, AttentionBackend]:
    """Each kind of kernel, in the dtype that it takes."""

    def spec(dtype: str) -> AttentionSpec:
        page = lay_out_page(GROUP.planes, page_size=PAGE_SIZE, num_heads=NUM_KV_HEADS, dtype=dtype)
        return AttentionSpec(num_heads=NUM_HEADS, page=page, key=GROUP.key, value=GROUP.value, device=DEVICE)

    return {
        "flashinfer": FlashInferAttentionBackend(spec("bfloat16"), library=_FLASHINFER, workspace_bytes=1024),
        "torch": TorchAttentionBackend(spec("float32")),
    }


def milliseconds(steps: Iterator[float]) -> str:
    """The median."""
    return f"{1000 * statistics.median(steps):.3f}"


def report(*, runs: int) -> None:
    """The table."""
    page = Report(
        "step_cost",
        title="What a decode step costs in Python",
        about="Milliseconds of one step, medians. A rank's: its plan parsed and applied to its tables, its attention "
        f"planned; page size {PAGE_SIZE}. The leader's: plans for all dp coordinates, all ranks' results, events.",
        headings=("who", "dp", "sequences of each", "context", "FlashInfer's arrays", "torch"),
    )
    kernels = backends()
    cases = [(dp, OWN_SEQUENCES, 1024) for dp in DP_SIZES]
    cases += [(1, CONTEXT_SEQUENCES, context) for context in CONTEXTS]
    for dp, sequences, context in cases:
        replica = DecodingReplica(dp=dp, sequences=sequences, context=context)
        measured = [milliseconds(replica.rank_steps(kernels[kind], runs=runs)) for kind in ("flashinfer", "torch")]
        page.add("a rank", str(dp), str(sequences), str(context), *measured)
    replica = DecodingReplica(dp=LEADER_DP, sequences=LEADER_SEQUENCES, context=256)
    page.add(
        "the leader", str(LEADER_DP), str(LEADER_SEQUENCES), "256", milliseconds(replica.leader_steps(runs=runs)), ""
    )
    page.publish(lambda axes: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    report(runs=parser.parse_args().runs)


if __name__ == "__main__":
    main()
