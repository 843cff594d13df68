"""Runs step plans on one rank: rows, forward, draws, and the hand-off of what was computed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attention.exchange.member import CpMember
from attention.exchange.plan import plan_exchange
from parallel.collectives.communicator import CollectiveClock
from proto import step_pb2
from worker.blocks.rope import RotaryTables
from worker.blocks.step_context import StepContext
from worker.device import completion, to_host
from worker.handoff.layer_wise import HandOff
from worker.models.decoder import Decoder
from worker.step.rows import StepRows
from worker.step.sequence_tables import SequenceTables
from worker.step.slot_tokens import SlotTokens
from worker.step.stage_ends import Drawn, StageInput, StageOutput


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """One rank's part of the model: its stage's two ends, the layers between them, and the kernels under them."""

    input: StageInput
    decoder: Decoder
    output: StageOutput
    slot_tokens: SlotTokens
    tables: SequenceTables
    members: Mapping[str, CpMember]
    """What this rank brings to the exchange of each cache group that has a layer on this stage."""
    ropes: RotaryTables
    dtype: torch.dtype
    device: torch.device


class ModelRunner:
    """The step path of one rank, the same in every pool."""

    def __init__(
        self,
        model: RankModel,
        *,
        global_rank: int,
        clock: CollectiveClock,
        hand_off: HandOff,
    ) -> None:
        self._model = model
        self._global_rank = global_rank
        self._clock = clock
        self._hand_off = hand_off

    @torch.inference_mode()
    def run(self, plan: step_pb2.StepPlan) -> Callable[[], step_pb2.StepResult]:
        """Launches one step, collective over the replica, and returns what waits for its result."""
        started, collective_before = time.perf_counter(), self._clock.seconds
        model = self._model
        for slot, token_id in model.tables.joining(plan):
            model.slot_tokens.join(slot, token_id)
        rows = model.tables.apply(plan)
        outgoing = self._hand_off.begin(rows.handed)
        # Planned before the rows are there: a later stage waits for them, and so does who embeds a token just drawn.
        context = self._context(rows)
        x_LH = model.decoder(model.input(rows), context, on_layer=outgoing.on_layer)
        drawn = model.output(rows, x_LH)
        tokens_S, probed = to_host(drawn.tokens_S), [to_host(logits) for logits in _probed(drawn, rows)]
        is_finite_S = to_host(drawn.is_finite_S)
        wait = completion(model.device)

        def result() -> step_pb2.StepResult:
            wait()
            flags = zip(drawn.slots, is_finite_S.tolist(), strict=True)
            return step_pb2.StepResult(
                step_id=plan.step_id,
                global_rank=self._global_rank,
                slots=drawn.slots,
                not_finite=[slot for slot, is_finite in flags if not is_finite],
                token_ids=tokens_S.tolist(),
                logits=[logits.numpy().tobytes() for logits in probed],
                step_s=time.perf_counter() - started,
                collective_s=self._clock.seconds - collective_before,
            )

        return result

    def _context(self, rows: StepRows) -> StepContext:
        model = self._model
        positions = torch.from_numpy(rows.positions).to(model.device, non_blocking=True)
        return StepContext(
            rotations=model.ropes(positions, dtype=model.dtype),
            exchanges={name: plan_exchange(rows.groups[name], member=member) for name, member in model.members.items()},
            padded_rows=rows.padded_rows,
        )


def _probed(drawn: Drawn, rows: StepRows) -> list[torch.Tensor]:
    """The logits of each draw, of size 0 where no probe asked for them; an empty list where none did at all."""
    asked = [slot in rows.probes and rows.probes[slot].logits for slot in drawn.slots]
    if not any(asked):
        return []
    return [logits if is_asked else logits[:0] for logits, is_asked in zip(drawn.logits_SV, asked, strict=True)]
