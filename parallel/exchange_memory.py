"""What the exchange over cp holds on a rank besides its pages, at most. Pure; of one layer, as layers run in turn.

Letters as in traffic.py: R rows of a cp rank in a full step, taken as even, H query heads of a rank, D head size,
e bytes of an element.
"""

from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import ReplicaShape
from parallel.sharding import kv_head_interval
from parallel.storage import CacheGroup

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

    The first is bounded by `settings.exchange_tokens`, what is being sent included, or by what one chunk sees of a
    window. The second follows from the step's tokens: cp · R rows come, cp · R partial outputs go, and as many return,
    each output with a log-sum-exp. 0 where there is nobody to exchange with.
    """
    if shape.attention.cp == 1:
        return 0
    return max(
        _group_bytes(description, group, shape=shape, settings=settings, step_tokens=step_tokens)
        for group in description.cache_groups
    )


def _group_bytes(
    description: ModelDescription,
    group: CacheGroup,
    *,
    shape: ReplicaShape,
    settings: EngineSettings,
    step_tokens: int,
) -> int:
    cp, tp = shape.attention.cp, shape.attention.tp
    # With every page of every rank gathered there is no more to be held.
    all_tokens = gathered_parts(cp) * settings.pages_of(group, pp=shape.pp) * settings.page_size
    bound = settings.exchange_tokens
    if group.window:
        bound = max(bound, gathered_parts(cp) * (group.window + step_tokens + 2 * settings.page_size))
    heads = kv_head_interval(group.num_kv_heads, tp=tp, tp_rank=0).padded
    held = min(bound, all_tokens) * group.token_bytes(num_heads=heads, dtype=settings.dtype)
    query_heads = max(description.attention[layer].num_heads for layer in group.layers) // tp
    key, value = (view.width * settings.dtype_bytes for view in (group.key, group.value))
    rows = cp * -(-step_tokens // cp)
    return max(held, rows * query_heads * (key + 2 * (value + _FLOAT_BYTES)))
