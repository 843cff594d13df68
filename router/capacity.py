"""How long a request may be so that the pools can hold it, from the plan: replicas of a pool are alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.admission import longest_sequence
from parallel.storage import CacheGroup
from parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Tokens of the longest prompt that is prefilled, and of the longest sequence that is decoded, prompt included."""

    prompt_tokens: int
    sequence_tokens: int

    @property
    def context_tokens(self) -> int:
        """Prompt and output together that fit however they are divided."""
        return min(self.prompt_tokens, self.sequence_tokens)


def capacity(topology: Topology, *, groups: Sequence[CacheGroup]) -> Capacity:
    """Of a topology with a pool that prefills and one that decodes, or one that does both; the model's cache groups."""
    longest = {
        replica.pool: longest_sequence(replica.engine, cp=replica.shape.attention.cp, groups=groups)
        for replica in topology.replicas
    }
    unified = longest.get("unified", 0)
    return Capacity(prompt_tokens=longest.get("prefill", unified), sequence_tokens=longest.get("decode", unified))
