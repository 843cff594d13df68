"""A step's chunks and their segments over the cp ranks: alike on every rank of a dp coordinate. No kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.arrays import Bools, Ints
from parallel.chunk import cut_segments
from parallel.page_columns import column
from proto import step_pb2


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """C chunks of a step: their slots and positions [start, end); the tokens of those that are a prompt's."""

    slots: Ints
    starts: Ints
    ends: Ints
    is_drawn: Bools
    token_ids: Sequence[npt.NDArray[np.int32]]

    @property
    def num_decoding(self) -> int:
        """The first so many are one token each, drawn before."""
        return len(self.slots) - len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """S segments of the chunks, in order; see ExchangeRows. A prompt's are computed by the owners of its pages, a
    decoding row at its home.
    """

    chunk: Ints
    computed_by: Ints
    start: Ints
    end: Ints


def plan_chunks(plan: step_pb2.StepPlan, *, lengths: Ints) -> Chunks:
    """The chunks of `plan`, each from where its slot's sequence ends by `lengths`."""
    decoding = column(plan.decode_slots).astype(np.int64)
    token_ids = [column(prompt.token_ids) for prompt in plan.prompts]
    slots = np.concatenate([decoding, np.array([prompt.slot for prompt in plan.prompts], dtype=np.int64)])
    counts = np.ones(len(slots), dtype=np.int64)
    counts[len(decoding) :] = [len(ids) for ids in token_ids]
    is_drawn = np.ones(len(slots), dtype=np.bool_)
    is_drawn[len(decoding) :] = [prompt.sample for prompt in plan.prompts]
    starts = lengths[slots]
    return Chunks(slots=slots, starts=starts, ends=starts + counts, is_drawn=is_drawn, token_ids=token_ids)


def cut_chunks(chunks: Chunks, *, homes: Ints, owners: npt.NDArray[np.int16], page_size: int) -> Segments:
    """Their segments: `homes` by slot, `owners` of the pages of each slot."""
    decoding, size = chunks.num_decoding, page_size
    parts = [
        Segments(
            chunk=np.arange(decoding),
            computed_by=homes[chunks.slots[:decoding]],
            start=chunks.starts[:decoding],
            end=chunks.ends[:decoding],
        )
    ]
    for chunk in range(decoding, len(chunks.slots)):
        start, end = int(chunks.starts[chunk]), int(chunks.ends[chunk])
        of_pages = owners[chunks.slots[chunk], start // size : -(-end // size)]
        cut = cut_segments(start=start, end=end, page_size=size, owners=of_pages)
        parts.append(
            Segments(chunk=np.full(len(cut.start), chunk), computed_by=cut.cp_rank, start=cut.start, end=cut.end)
        )
    return Segments(
        chunk=np.concatenate([part.chunk for part in parts]),
        computed_by=np.concatenate([part.computed_by for part in parts]),
        start=np.concatenate([part.start for part in parts]),
        end=np.concatenate([part.end for part in parts]),
    )
