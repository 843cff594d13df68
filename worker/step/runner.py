"""Runs step plans on one rank: rows, forward, draws, and the hand-off of what was computed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attention.exchange import plan_exchange
from attention.exchange_choice import ExchangePolicy
from attention.exchange_chunk import ExchangeChunk
from attention.interface import AttentionBackend, KvWrite
from parallel.collectives.communicator import CollectiveClock, Communicator
from proto import step_pb2
from worker.blocks.rope import RotaryEmbedding
from worker.blocks.step_context import StepContext
from worker.device import completion, to_host
from worker.handoff.layer_wise import HandOff
from worker.models.decoder import Decoder
from worker.step.rows import PlacedChunk, SequenceTables, StepRows
from worker.step.slot_tokens import SlotTokens
from worker.step.stage_ends import Drawn, StageInput, StageOutput


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """One rank's part of the model: its stage's two ends, the layers between them, and the kernels under them."""

    input: StageInput
    decoder: Decoder
    output: StageOutput
    slot_tokens: SlotTokens
    backend: AttentionBackend
    policy: ExchangePolicy
    rope: RotaryEmbedding
    dtype: torch.dtype
    device: torch.device


class ModelRunner:
    """The step path of one rank, the same in every pool."""

    def __init__(
        self,
        model: RankModel,
        *,
        tables: SequenceTables,
        global_rank: int,
        cp: Communicator,
        clock: CollectiveClock,
        hand_off: HandOff,
    ) -> None:
        self._model = model
        self._tables = tables
        self._global_rank = global_rank
        self._cp = cp
        self._clock = clock
        self._hand_off = hand_off

    @torch.inference_mode()
    def run(self, plan: step_pb2.StepPlan) -> Callable[[], step_pb2.StepResult]:
        """Launches one step, collective over the replica, and returns what waits for its result."""
        started, collective_before = time.perf_counter(), self._clock.seconds
        model = self._model
        for slot, token_id in self._tables.joining(plan):
            model.slot_tokens.join(slot, token_id)
        rows = self._tables.apply(plan)
        outgoing = self._hand_off.begin([item for item in rows.chunks if item.sequence.target is not None])
        x_LH = model.decoder(model.input(rows), self._context(rows), on_layer=outgoing.on_layer)
        drawn = model.output(rows, x_LH)
        tokens_S, probed = to_host(drawn.tokens_S), [to_host(logits) for logits in _probed(drawn)]
        is_finite_S = to_host(drawn.is_finite_S)
        wait = completion(model.device)

        def result() -> step_pb2.StepResult:
            wait()
            slots = [item.sequence.slot for item in drawn.items]
            return step_pb2.StepResult(
                step_id=plan.step_id,
                global_rank=self._global_rank,
                slots=slots,
                not_finite=[slot for slot, is_finite in zip(slots, is_finite_S.tolist(), strict=True) if not is_finite],
                token_ids=tokens_S.tolist(),
                logits=[logits.numpy().tobytes() for logits in probed],
                step_s=time.perf_counter() - started,
                collective_s=self._clock.seconds - collective_before,
            )

        return result

    def _context(self, rows: StepRows) -> StepContext:
        model = self._model
        positions = torch.from_numpy(rows.positions).to(model.device, non_blocking=True)
        cos, sin = model.rope(positions, dtype=model.dtype)
        return StepContext(
            num_rows=rows.num_rows,
            cos=cos,
            sin=sin,
            write=KvWrite(
                pages=torch.from_numpy(rows.pages).to(model.device, non_blocking=True),
                offsets=torch.from_numpy(rows.offsets).to(model.device, non_blocking=True),
            ),
            exchange=plan_exchange(
                [_exchange_chunk(item) for item in rows.chunks],
                group=self._cp,
                backend=model.backend,
                policy=model.policy,
                device=model.device,
            ),
            padded_rows=rows.padded_rows,
        )


def _exchange_chunk(item: PlacedChunk) -> ExchangeChunk:
    return ExchangeChunk(
        table=item.sequence.table, segments=item.segments, cached_tokens=item.chunk.cached_tokens, end=item.end
    )


def _probed(drawn: Drawn) -> list[torch.Tensor]:
    """The logits of each draw, of size 0 where no probe asked for them; an empty list where none did at all."""
    if not any(item.chunk.logits for item in drawn.items):
        return []
    return [
        logits if item.chunk.logits else logits[:0] for logits, item in zip(drawn.logits_SV, drawn.items, strict=True)
    ]
