"""Which exchange a chunk takes: a pure function of its sizes and of the link, as every cp rank must choose alike.

After "Context Parallelism for Scalable Million-Token Inference" (arXiv 2411.01783), section 3.5: KV is passed where
much of it is new, or where the pass hides behind attention; queries are passed where few tokens meet a long cache.
With T new and P cached tokens (of a window those inside it), a row of q and of output as many bytes as its heads are
wide, and H of those heads, a rank sends

    KV       (cp - 1) / cp * (T + P) * bytes of a token's planes       gathered at once, or in a ring behind attention
    queries  (cp - 1) / cp * T * (bytes of q + of an output + 4 H)     there and, with a log-sum-exp of 4 bytes, back

and, but for gathered KV, merges (cp - 1) / cp * T * bytes of an output of partial results. New K and V that go to
another rank's pages travel in any of them alike. Gathered KV is one message, a ring two for each other rank, queries
and the two that come back are three: each for all chunks of a step that go the same way, so a chunk has its share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from attention.exchange.rows import ExchangeRows
from parallel.arrays import Bools, Ints
from parallel.exchange_memory import gathered_parts
from parallel.link import LinkSpeed


class Strategy(Enum):
    """How queries and remote KV meet; LOCAL where there is none."""

    LOCAL = "local"
    GATHER = "gather"
    RING = "ring"
    PASS_Q = "pass_q"


#: Those that cost something, in the order in which a tie is broken.
REMOTE = (Strategy.GATHER, Strategy.RING, Strategy.PASS_Q)


@dataclass(frozen=True, kw_only=True)
class ExchangePolicy:
    """Sizes are those of one rank, of one layer of the cache group: `token_bytes` of what a token stores, `query_bytes`
    and `output_bytes` of a row over its `num_heads` heads, `key_flops` of a row that meets one key.

    `forced` is what the configuration asks for, None for auto. What a `window` sees is gathered always: it is little,
    and its pages are then in order of position. `max_tokens` bounds what an exchange holds besides the pages: tokens
    whose KV is gathered, or in a ring under way, what is being sent included; of a window, what one chunk sees.
    """

    page_size: int
    num_heads: int
    token_bytes: int
    query_bytes: int
    output_bytes: int
    key_flops: int
    link: LinkSpeed
    max_tokens: int
    window: int = 0
    forced: Strategy | None = None

    def parts(self, rows: ExchangeRows) -> Iterator[tuple[Strategy, Bools]]:
        """The strategies of a step with the segments [S] of each, in the order that all cp ranks share."""
        chosen = self.choose(rows)
        present = set(chosen)
        for strategy in [strategy for strategy in Strategy if strategy in present]:
            chunks = np.array([choice is strategy for choice in chosen], dtype=np.bool_)
            gathers_windows = strategy is Strategy.GATHER and self.window
            for part in self._bounded(chunks, rows) if gathers_windows else (chunks,):
                yield strategy, part[rows.chunk]

    def choose(self, rows: ExchangeRows) -> list[Strategy]:
        """The strategy of each chunk [C]. Gathers share one workspace: one that it has no room for goes in a ring."""
        is_local = self._is_local(rows)
        if is_local.all():
            return [Strategy.LOCAL] * len(is_local)
        fixed = Strategy.GATHER if self.window else self.forced
        if fixed:
            chosen = [fixed] * len(is_local)
        else:
            num_chunks = int((~is_local).sum())
            cheapest = self._cheapest(rows.new_tokens, rows.cached_tokens, cp=rows.cp, num_chunks=num_chunks)
            chosen = [REMOTE[index] for index in cheapest.tolist()]
        chosen = [Strategy.LOCAL if local else choice for local, choice in zip(is_local, chosen, strict=True)]
        if Strategy.GATHER in chosen and not self.window:
            self._move_to_rings(chosen, rows)
        return chosen

    def cheapest(self, *, new_tokens: int, cached_tokens: int, cp: int, num_chunks: int = 1) -> Strategy:
        """The strategy whose exchange adds the least time to the attention of one of so many equal chunks."""
        found = self._cheapest(np.array([new_tokens]), np.array([cached_tokens]), cp=cp, num_chunks=num_chunks)
        return REMOTE[int(found[0])]

    def costs(self, *, new_tokens: int, cached_tokens: int, cp: int) -> dict[Strategy, float]:
        """Seconds a layer that each strategy adds to the attention itself of a chunk that is alone."""
        costs = self._costs(np.array([new_tokens]), np.array([cached_tokens]), cp=cp, num_chunks=1)
        return {strategy: float(cost) for strategy, cost in zip(REMOTE, costs[:, 0], strict=True)}

    def _cheapest(self, new_tokens: Ints, cached_tokens: Ints, *, cp: int, num_chunks: int) -> Ints:
        cheapest: Ints = self._costs(new_tokens, cached_tokens, cp=cp, num_chunks=num_chunks).argmin(axis=0)
        return cheapest

    def _costs(self, new_tokens: Ints, cached_tokens: Ints, *, cp: int, num_chunks: int) -> npt.NDArray[np.float64]:
        """Seconds a layer [3, C], in the order of REMOTE."""
        link, share = self.link, (cp - 1) / cp
        message_s = link.latency_s / num_chunks
        kv_s = share * (new_tokens + cached_tokens) * self.token_bytes / link.bytes_per_s
        row_bytes = self.query_bytes + self.output_bytes + 4 * self.num_heads
        query_s = share * new_tokens * row_bytes / link.bytes_per_s
        attention_s = new_tokens * (cached_tokens + new_tokens / 2) * self.key_flops / cp / link.flops
        merge_s = share * new_tokens * self.output_bytes / link.merge_bytes_per_s
        hidden_s = link.hidden * np.minimum(kv_s, share * attention_s)
        return np.stack(
            [
                kv_s + message_s,
                kv_s - hidden_s + merge_s + 2 * (cp - 1) * message_s,
                query_s + merge_s + 3 * message_s,
            ]
        )

    @staticmethod
    def _is_local(rows: ExchangeRows) -> Bools:
        """[C]: whether no segment of a chunk sees another rank's pages than the one's that computes it. A row that is
        stored elsewhere sees its own page there.
        """
        visible = rows.seen - rows.skipped
        at_home = visible[np.arange(len(visible)), rows.computed_by]
        is_elsewhere = visible.sum(axis=1) != at_home
        is_local: Bools = np.bincount(rows.chunk[is_elsewhere], minlength=len(rows.new_tokens)) == 0
        return is_local

    def _move_to_rings(self, chosen: list[Strategy], rows: ExchangeRows) -> None:
        held = np.zeros(rows.cp, dtype=np.int64)
        for chunk, pages in enumerate(self._pages_of(rows)):
            if chosen[chunk] is Strategy.GATHER:
                if self._held_tokens(held + pages) > self.max_tokens:
                    chosen[chunk] = Strategy.RING
                else:
                    held = held + pages

    def _bounded(self, chunks: Bools, rows: ExchangeRows) -> Iterator[Bools]:
        """The chunks in parts that are gathered one after the other, each within the bound or of one chunk."""
        pages = self._pages_of(rows)
        part, held = np.zeros_like(chunks), np.zeros(rows.cp, dtype=np.int64)
        for chunk in np.flatnonzero(chunks):
            if part.any() and self._held_tokens(held + pages[chunk]) > self.max_tokens:
                yield part
                part, held = np.zeros_like(chunks), np.zeros_like(held)
            part[chunk] = True
            held = held + pages[chunk]
        yield part

    @staticmethod
    def _pages_of(rows: ExchangeRows) -> Ints:
        """[C, cp]: pages of each cp rank that a chunk sees."""
        found = np.zeros((len(rows.new_tokens), rows.cp), dtype=np.int64)
        chunks, first, last = rows.chunk_bounds
        found[chunks] = rows.seen[last] - rows.skipped[first]
        return found

    def _held_tokens(self, pages: Ints) -> int:
        """Tokens that a rank holds while `pages` [cp] of each rank are gathered: each part is padded to the longest."""
        return gathered_parts(len(pages)) * int(pages.max()) * self.page_size
