"""What the exchange over cp holds on a rank besides its pages, at most. Pure; of one layer, as layers run in turn.

Letters as in traffic.py: R rows of a cp coordinate in a full step, taken as even, H query heads of a rank, D head size,
e bytes of an element.
"""

from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.sharding import kv_elements_per_layer

#: Blocks of a ring that a rank holds at once: one comes, one is worked on, one goes.
RING_BLOCKS = 3
_FLOAT_BYTES = 4


def gathered_parts(cp: int) -> int:
    """Coordinates' parts of the KV that a rank holds while it is gathered: all, and once more its own that goes out."""
    return cp + 1


def exchange_bytes(
    description: ModelDescription, *, shape: ReplicaShape, settings: EngineSettings, step_tokens: int
) -> int:
    """Bytes of the larger of both: KV that is gathered or in a ring under way, or passed queries with their results.

    The first is bounded by `settings.exchange_tokens`, what is being sent included. The second follows from the step's
    tokens: cp · R rows come, cp · R partial outputs go, and as many return, each output with a log-sum-exp.
    0 where there is nobody to exchange with.
    """
    cp = shape.attention.cp
    if cp == 1:
        return 0
    # With every page of every coordinate gathered there is no more to be held.
    held_tokens = min(settings.exchange_tokens, gathered_parts(cp) * settings.kv_tokens)
    layer_elements = max(kv_elements_per_layer(description, tp=shape.attention.tp).values())
    heads = description.num_heads // shape.attention.tp
    query_bytes = description.head_dim * settings.dtype_bytes
    rows = cp * -(-step_tokens // cp)
    passed = rows * heads * (query_bytes + 2 * (query_bytes + _FLOAT_BYTES))
    return max(held_tokens * layer_elements * settings.dtype_bytes, passed)
