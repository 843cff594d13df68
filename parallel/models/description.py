"""What a model is, without torch: its sizes, its tensors and how each is split, what its layers store.

From a description `router check` counts bytes, the loader reads slices, and pages, exchange and hand-off take their
sizes. Descriptions of single families live beside this file; `registry.py` finds them by `model_type`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Split(Enum):
    """Along what a tensor's dimension is cut over ranks."""

    QUERY_HEADS = "query heads over attention tp, head_dim rows each"
    KV_HEADS = "KV heads over attention tp, head_dim rows each, replicated where tp exceeds them"
    VOCABULARY = "vocabulary over attention tp, zero-padded"
    DENSE_INTERMEDIATE = "feed-forward width over attention tp, zero-padded"
    EXPERT_INTERMEDIATE = "an expert's width over moe_tp, zero-padded"


class Part(Enum):
    """Which stages of a replica hold a tensor."""

    EMBEDDING = "the first stage, and the last where the output is tied to it"
    LAYER = "the stage of its layer"
    OUTPUT = "the last stage"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the checkpoint. `splits` maps a dimension to its split; `expert` is set for an expert's own."""

    name: str
    shape: tuple[int, ...]
    part: Part
    layer: int | None = None
    expert: int | None = None
    splits: tuple[tuple[int, Split], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a layer stores per token: `size` elements, for each KV head where `per_head`, else once."""

    name: str
    size: int
    per_head: bool


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that store alike; each group has its own page table and free list."""

    name: str
    layers: tuple[int, ...]
    per_token: tuple[StoredTensor, ...]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: inverse frequencies of `theta` over the head size (RoFormer, arXiv 2104.09864)."""

    theta: float


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """The experts of each layer: `top_k` of `num_experts` chosen by softmax and renormalised to sum to one."""

    num_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """One model. Exactly one of `intermediate_size` and `experts` is set; heads are counts of the whole model."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int | None
    experts: ExpertSpec | None
    norm_eps: float
    rope: RopeSpec
    tied_embeddings: bool
    max_positions: int
    checkpoint_dtype: str
    cache_groups: tuple[CacheGroup, ...]
    tensors: tuple[TensorSpec, ...]


#: Builds a description from the values of a checkpoint's config.json; ValueError names the key that it cannot serve.
Describe = Callable[[dict[str, object]], ModelDescription]
