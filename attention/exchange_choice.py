"""Which exchange a chunk takes: a pure function of its sizes and of the link, as every cp rank must choose alike.

After "Context Parallelism for Scalable Million-Token Inference" (arXiv 2411.01783), section 3.5: KV is passed where
much of it is new, or where the pass hides behind attention; queries are passed where few tokens meet a long cache.
With T new and P cached tokens, H query and Hkv KV heads of size D, e bytes an element, a rank sends

    KV       (cp - 1) / cp * 2 (T + P) Hkv D e          gathered at once, or in a ring behind the attention
    queries  (cp - 1) / cp * T H (2 D e + 4)            there and, with a log-sum-exp of 4 bytes, back

and, but for gathered KV, merges (cp - 1) / cp * T H D e of partial outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from attention.exchange_chunk import ExchangeChunk
from parallel.exchange_memory import gathered_parts
from parallel.link import LinkSpeed


class Strategy(Enum):
    """How queries and remote KV meet."""

    GATHER = "gather"
    RING = "ring"
    PASS_Q = "pass_q"


@dataclass(frozen=True, kw_only=True)
class ExchangePolicy:
    """`forced` is what the configuration asks for, None for auto. Heads are those of one rank.

    `max_tokens` bounds what an exchange holds besides the pages: tokens whose KV is gathered, or in a ring under way,
    what is being sent included.
    """

    page_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    link: LinkSpeed
    max_tokens: int
    forced: Strategy | None = None

    def choose(self, chunks: Sequence[ExchangeChunk], *, cp: int) -> list[Strategy]:
        """The strategy of each chunk. Gathers share one workspace: one that it has no room for goes in a ring."""
        held, chosen = [0] * cp, []
        for chunk in chunks:
            strategy = self.forced or self.cheapest(
                new_tokens=chunk.new_tokens, cached_tokens=chunk.cached_tokens, cp=cp
            )
            if strategy is Strategy.GATHER:
                after = [held[c] + chunk.num_pages_of(c, page_size=self.page_size) for c in range(cp)]
                # Every coordinate's part is padded to the longest.
                if gathered_parts(cp) * max(after) * self.page_size > self.max_tokens:
                    strategy = Strategy.RING
                else:
                    held = after
            chosen.append(strategy)
        return chosen

    def cheapest(self, *, new_tokens: int, cached_tokens: int, cp: int) -> Strategy:
        """The strategy whose exchange adds the least time to the attention of one chunk."""
        costs = self.costs(new_tokens=new_tokens, cached_tokens=cached_tokens, cp=cp)
        return min(Strategy, key=lambda strategy: costs[strategy])

    def costs(self, *, new_tokens: int, cached_tokens: int, cp: int) -> dict[Strategy, float]:
        """Seconds a layer that each strategy adds to the attention itself."""
        link, size = self.link, self.head_dim
        share = (cp - 1) / cp
        kv_bytes = share * 2 * (new_tokens + cached_tokens) * self.num_kv_heads * size * self.element_bytes
        query_bytes = share * new_tokens * self.num_heads * (2 * size * self.element_bytes + 4)
        attention_s = 4 * new_tokens * (cached_tokens + new_tokens / 2) * self.num_heads * size / cp / link.flops
        kv_s = kv_bytes / link.bytes_per_s
        merge_s = share * new_tokens * self.num_heads * size * self.element_bytes / link.merge_bytes_per_s
        return {
            Strategy.GATHER: kv_s + link.latency_s,
            Strategy.RING: kv_s
            - link.hidden * min(kv_s, share * attention_s)
            + merge_s
            + 2 * (cp - 1) * link.latency_s,
            Strategy.PASS_Q: query_bytes / link.bytes_per_s + merge_s + 2 * link.latency_s,
        }
