"""Runs step plans on one rank: rows, forward, draws, and the hand-off of what was computed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attention.exchange import Exchange, plan_exchange
from attention.interface import AttentionBackend, AttentionRows, KvWrite
from parallel.communicator import CollectiveClock, Communicator
from parallel.settings import EngineSettings
from proto import step_pb2
from worker.blocks.rope import RotaryEmbedding
from worker.blocks.step_context import StepContext
from worker.blocks.vocabulary import Embedding, Output
from worker.device import completion, to_host
from worker.models.decoder import Decoder
from worker.sampler import Draw, draw_tokens
from worker.step_rows import PlacedChunk, SequenceTables, StepRows


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """One rank's model: what turns token ids into logits, and the kernels under it."""

    embedding: Embedding
    decoder: Decoder
    output: Output
    backend: AttentionBackend
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
        settings: EngineSettings,
        num_slots: int,
        global_rank: int,
        cp: Communicator,
        clock: CollectiveClock,
        hand_off: Callable[[PlacedChunk, Callable[[], None]], None],
    ) -> None:
        self._model = model
        self._tables = tables
        self._page_size = settings.page_size
        self._global_rank = global_rank
        self._cp = cp
        self._clock = clock
        self._hand_off = hand_off
        # The token drawn last in each slot: the next chunk embeds it without asking the host.
        self._slot_tokens = torch.zeros(num_slots, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def run(self, plan: step_pb2.StepPlan) -> Callable[[], step_pb2.StepResult]:
        """Launches one step, collective over the replica, and returns what waits for its result."""
        started, collective_before = time.perf_counter(), self._clock.seconds
        for slot, token_id in self._tables.joining(plan):
            self._slot_tokens[slot] = token_id
        rows = self._tables.apply(plan)
        x_TH = self._model.embedding(self._token_ids(rows))
        x_TH = self._model.decoder(x_TH, self._context(rows), on_layer=lambda _: None)
        logits_SV, tokens_S = self._draw(rows, x_TH)
        tokens_S, probed = to_host(tokens_S), [to_host(logits) for logits in _probed(rows, logits_SV)]
        wait = completion(self._model.device)
        for item in rows.chunks:
            if item.sequence.target is not None:
                self._hand_off(item, wait)

        def result() -> step_pb2.StepResult:
            wait()
            return step_pb2.StepResult(
                step_id=plan.step_id,
                global_rank=self._global_rank,
                slots=[item.sequence.slot for _, item in rows.draws],
                token_ids=tokens_S.tolist(),
                logits=[logits.numpy().tobytes() for logits in probed],
                step_s=time.perf_counter() - started,
                collective_s=self._clock.seconds - collective_before,
            )

        return result

    def _token_ids(self, rows: StepRows) -> torch.Tensor:
        ids = torch.from_numpy(rows.token_ids).to(self._model.device, non_blocking=True)
        if len(rows.slot_rows):
            slots = self._slot_tokens[torch.from_numpy(rows.slots).to(self._model.device)]
            ids[torch.from_numpy(rows.slot_rows).to(self._model.device)] = slots
        return ids

    def _context(self, rows: StepRows) -> StepContext:
        model = self._model
        exchange = self._plan_exchange(rows)
        positions = torch.from_numpy(rows.positions).to(model.device, non_blocking=True)
        cos, sin = model.rope(positions, dtype=model.dtype)
        return StepContext(
            cos=cos,
            sin=sin,
            write=KvWrite(
                pages=torch.from_numpy(rows.pages).to(model.device, non_blocking=True),
                offsets=torch.from_numpy(rows.offsets).to(model.device, non_blocking=True),
            ),
            plan=model.backend.plan(
                [
                    AttentionRows(
                        num_rows=segment.end - segment.start,
                        kv_len=segment.end,
                        page_table=exchange.address(segment.sequence.table[: -(-segment.end // self._page_size)]),
                    )
                    for segment in rows.segments
                ]
            ),
            exchange=exchange,
            padded_rows=rows.padded_rows,
        )

    def _plan_exchange(self, rows: StepRows) -> Exchange:
        tables = [item.sequence.table[: -(-item.end // self._page_size)] for item in rows.chunks]
        return plan_exchange(self._cp, tables=tables, device=self._model.device)

    def _draw(self, rows: StepRows, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [S, V] and tokens [S] of the rows that end a chunk; the tokens stay on the device."""
        index = torch.tensor([row for row, _ in rows.draws], dtype=torch.int64, device=x_TH.device)
        if not rows.draws:
            return x_TH.new_empty((0, 0)), index
        logits_SV = self._model.output(x_TH[index])
        draws = [Draw(sampling=item.sequence.sampling, position=item.end) for _, item in rows.draws]
        tokens_S = draw_tokens(logits_SV, draws)
        for row, (_, item) in enumerate(rows.draws):
            if item.chunk.HasField("forced_id"):
                tokens_S[row] = item.chunk.forced_id
        slots = torch.tensor([item.sequence.slot for _, item in rows.draws], dtype=torch.int64, device=x_TH.device)
        self._slot_tokens[slots] = tokens_S
        return logits_SV, tokens_S


def _probed(rows: StepRows, logits_SV: torch.Tensor) -> list[torch.Tensor]:
    """The logits of each draw, of size 0 where no probe asked for them; an empty list where none did at all."""
    if not any(item.chunk.logits for _, item in rows.draws):
        return []
    return [
        logits_SV[index] if item.chunk.logits else logits_SV[index, :0] for index, (_, item) in enumerate(rows.draws)
    ]
