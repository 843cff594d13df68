"""The rows of a step that one rank computes, and what its blocks, its ends and its hand-off need to know of them."""

from dataclasses import dataclass

from attention.exchange.rows import ExchangeRows
from parallel.arrays import Ints
from proto import step_pb2
from worker.step.sequences import HandedChunk


@dataclass(frozen=True, kw_only=True)
class DrawRows:
    """D rows whose next token is drawn: their places among the rows, their slots, and where the drawn
    token will stand; [D]. No rank of the replica draws for more than `padded` of its own.
    """

    rows: Ints
    slots: Ints
    positions: Ints
    padded: int


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """The rows of one cp rank of a dp coordinate in a step, the same on its tp ranks and all stages, padded so that its
    tp ranks have `local_rows` each: rank t those from t * local_rows on. T with padding.

    `padded_rows` is the largest local row count of the stage. `token_ids` [T] are the prompts'; rows that embed the
    last token of a slot are listed in `slot_rows` with their `slots`. `drawn_slots` are those that a token is drawn for
    anywhere in the dp coordinate, and that may embed it here. `groups` say, by cache group, what rows see.
    """

    local_rows: int
    padded_rows: int
    positions: Ints
    token_ids: Ints
    slot_rows: Ints
    slots: Ints
    draws: DrawRows
    drawn_slots: list[int]
    probes: dict[int, step_pb2.ProbedDraw]
    handed: tuple[HandedChunk, ...]
    groups: dict[str, ExchangeRows]
