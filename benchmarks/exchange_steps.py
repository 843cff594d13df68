"""A step's rows as all cp ranks know them, made by hand: for exchanges without a leader."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.exchange.choice import ExchangePolicy, Strategy
from attention.exchange.rows import ExchangeRows
from parallel.chunk import choose_offset, cut_segments, new_page_owners
from parallel.link import LINKS, Link, LinkSpeed
from parallel.page_columns import packed
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import EVERYTHING, CacheGroup, Sight, keys_and_values
from proto import control_pb2, step_pb2
from worker.step.rows import StepRows
from worker.step.sequence_tables import SequenceTables

#: Of the memory that the steps are planned for; the spare page comes after them.
NUM_PAGES = 400


@dataclass(frozen=True, kw_only=True)
class StepChunk:
    """`new_tokens` of a prompt after `cached_tokens`, which were a chunk before; or, with a `home`, one token that is
    decoded there.
    """

    cached_tokens: int
    new_tokens: int
    home: int | None = None


def cache_group(*, sees: Sight = EVERYTHING, num_kv_heads: int = 2, head_size: int = 8) -> CacheGroup:
    """A group of one layer."""
    return keys_and_values("full", layers=(0,), sees=sees, num_kv_heads=num_kv_heads, head_size=head_size)


def exchange_policy(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    element_bytes: int = 4,
    link: LinkSpeed = LINKS[Link.GLOO],
    max_tokens: int = 1 << 20,
    forced: Strategy | None = None,
    window: int = 0,
) -> ExchangePolicy:
    """That of a rank with so many heads of keys and values of one size."""
    head_bytes = head_dim * element_bytes
    return ExchangePolicy(
        page_size=page_size,
        num_heads=num_heads,
        token_bytes=2 * num_kv_heads * head_bytes,
        query_bytes=num_heads * head_bytes,
        output_bytes=num_heads * head_bytes,
        key_flops=4 * num_heads * head_dim,
        link=link,
        max_tokens=max_tokens,
        forced=forced,
        window=window,
    )


def step_rows(
    chunks: Sequence[StepChunk],
    *,
    cp: int,
    cp_rank: int,
    page_size: int,
    group: CacheGroup | None = None,
    tp: int = 1,
) -> StepRows:
    """The rows of `cp_rank` in a step of these chunks, each of a sequence of its own. Decoding ones come first. Pages
    are numbered on each rank in the order of their chunks. With `tp` there is padding where rows do not share out.
    """
    shape = ReplicaShape(attention=AttentionSizes(cp=cp, tp=tp), experts=None)
    settings = EngineSettings(page_size=page_size, max_sequences=len(chunks), kv_tokens=NUM_PAGES * page_size)
    tables = SequenceTables(
        shape=shape,
        coordinates=shape.coordinates(cp_rank * tp),
        settings=settings,
        groups=[group or cache_group()],
        device=torch.device("cpu"),
    )
    plan, new, pages, counts = step_pb2.StepPlan(), _Columns(), [0] * cp, np.zeros(cp, dtype=np.int64)
    decoding = []
    for slot, chunk in enumerate(chunks):
        cached, owners = _cut(chunk, cp=cp, page_size=page_size)
        numbers = []
        for owner in owners:
            numbers.append(pages[owner])
            pages[owner] += 1
        joined = control_pb2.Pages(cp_ranks=packed(owners[:cached]), pages=packed(numbers[:cached]))
        plan.joins.add(
            slot=slot,
            cached_tokens=chunk.cached_tokens,
            prompt_end=chunk.cached_tokens + chunk.new_tokens,
            pages=[joined],
            home=chunk.home or 0,
        )
        new.add(slot, owners[cached:], numbers[cached:])
        if chunk.home is None:
            plan.prompts.add(slot=slot, token_ids=packed(np.zeros(chunk.new_tokens)), sample=True)
            end = chunk.cached_tokens + chunk.new_tokens
            of_chunk = owners[chunk.cached_tokens // page_size :]
            cut = cut_segments(start=chunk.cached_tokens, end=end, page_size=page_size, owners=of_chunk)
            counts += cut.rows_by_rank(cp)
        else:
            decoding.append(slot)
            counts[chunk.home] += 1
    plan.decode_slots = packed(decoding)
    plan.local_rows.extend((-(-counts // tp)).tolist())
    plan.new_pages.add(slots=packed(new.slots), cp_ranks=packed(new.owners), pages=packed(new.pages))
    return tables.apply(plan)


def exchange_rows(chunks: Sequence[StepChunk], *, cp: int, cp_rank: int, page_size: int) -> ExchangeRows:
    """The one group of `step_rows`."""
    return step_rows(chunks, cp=cp, cp_rank=cp_rank, page_size=page_size).groups["full"]


class _Columns:
    def __init__(self) -> None:
        self.slots: list[int] = []
        self.owners: list[int] = []
        self.pages: list[int] = []

    def add(self, slot: int, owners: Sequence[int], pages: Sequence[int]) -> None:
        self.slots += [slot] * len(owners)
        self.owners += owners
        self.pages += pages


def _cut(chunk: StepChunk, *, cp: int, page_size: int) -> tuple[int, list[int]]:
    """How many pages there are before the chunk, and the owners of all, as a leader would have chosen them."""
    owners: list[int] = []
    counts = []
    for end in (chunk.cached_tokens, chunk.cached_tokens + chunk.new_tokens):
        pages = -(-end // page_size) - len(owners)
        held = [owners.count(index) for index in range(cp)]
        offset = choose_offset(pages=pages, cp=cp, held=held, load=held)
        owners += new_page_owners(pages=pages, cp=cp, offset=offset).tolist()
        counts.append(len(owners))
    return counts[0], owners
