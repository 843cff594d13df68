"""What a model is, without torch: its sizes, its tensors and how each is split, what its layers store.

From a description `router check` counts bytes, the loader reads slices, and pages, exchange and hand-off take their
sizes. Descriptions of single families live beside this file; `registry.py` finds them by `model_type`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from parallel.models.file_tensors import ExpertStack, FileTensor, stacked_in
from parallel.models.gates import SWIGLU, Activation, GateSpec
from parallel.storage import CacheGroup


class Split(Enum):
    """Along what a tensor's dimension is cut over ranks."""

    QUERY_HEADS = "query heads over attention tp, head_dim rows each"
    KV_HEADS = "KV heads over attention tp, head_dim rows each, replicated where tp exceeds them"
    VOCABULARY = "vocabulary over attention tp, zero-padded"
    OUTPUT_VOCABULARY = "vocabulary over the axis that the output is split along, zero-padded"
    DENSE_INTERMEDIATE = "feed-forward width over attention tp, zero-padded"
    EXPERT_INTERMEDIATE = "an expert's width over moe_tp, zero-padded"
    EXPERT_PAIRS = "an expert's width over moe_tp, zero-padded, a row of gate and one of up in turn"


class Part(Enum):
    """Which stages of a replica hold a tensor."""

    EMBEDDING = "the first stage"
    LAYER = "the stage of its layer"
    OUTPUT = "the last stage"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the model. `splits` maps a dimension to its split; `expert` is set for an expert's own.

    The weight files hold it under its name, or in the `stack` of all experts. A bias that is added to a sum over the
    ranks of a split is held by the first of them alone, and is in the sum once: `added_over` that split. One
    `in_float32` is held and computed with in float32 whatever the model's dtype is. One that is `tied_to` another has
    that one's place in the files.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    layer: int | None = None
    expert: int | None = None
    splits: tuple[tuple[int, Split], ...] = ()
    stack: ExpertStack | None = None
    added_over: Split | None = None
    in_float32: bool = False
    tied_to: str = ""

    @property
    def in_files(self) -> tuple[FileTensor, ...]:
        """What the weight files hold it in."""
        if self.stack is None:
            return (FileTensor(name=self.tied_to or self.name, shape=self.shape),)
        return stacked_in(self.stack, self.shape)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (YaRN, arXiv 2309.00071).

    The ramp lies where a frequency turns `beta_fast` to `beta_slow` times within `original_positions`; `truncate`
    rounds its ends outwards to whole frequencies.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long waves divided by `factor`, short ones kept, a ramp between (Llama 3.1, arXiv 2407.21783).

    Wavelengths are long and short by `original_positions` over `low_freq_factor` and over `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
    """Each of the rotary_dim / 2 frequencies divided by a factor of its own (LongRoPE, arXiv 2402.13753)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | YarnScaling | Llama3Scaling | FrequencyFactors


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: inverse frequencies of `theta` over `rotary_dim` (RoFormer, arXiv 2104.09864), scaled.

    The first `rotary_dim` elements of a head are rotated, in most families all of them; the rest stay as they are.
    cos and sin are multiplied by `attention_factor`. A sequence may have `max_positions`; `limit_reason` says why,
    where the checkpoint itself would allow more. Nothing here depends on a sequence's length: keys that one chunk
    stores stay right for every later one.
    """

    theta: float
    rotary_dim: int
    max_positions: int
    scaling: RopeScaling | None = None
    attention_factor: float = 1.0
    limit_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """How one layer attends: `num_heads` query heads of the whole model, their rope, what scores are multiplied by.

    With `has_sinks` each head has a learned score that takes a share of the weight and gives no value.
    """

    num_heads: int
    rope: RopeSpec
    scale: float
    has_sinks: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """The experts of each of `layers`, each `intermediate_size` wide, and their gate.

    Beside those that it chose, every row takes a dense feed-forward of `shared_width`; 0 where there is none.
    """

    gate: GateSpec
    intermediate_size: int
    layers: tuple[int, ...]
    activation: Activation = SWIGLU
    shared_width: int = 0

    @property
    def num_experts(self) -> int:
        """Experts of each layer, without the shared one."""
        return self.gate.num_experts

    @property
    def top_k(self) -> int:
        """Experts that a row goes to."""
        return self.gate.top_k


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """One model. `attention` has an entry for each layer; each layer is in one of the `cache_groups`.

    `intermediate_size` is the width of layers without experts, None where there are none; `experts` None where no layer
    has any. A model with layers of both kinds has both. A checkpoint may hold `num_nextn_predict_layers` after the last
    layer, which draft further tokens: none is read.
    """

    family: str
    num_layers: int
    num_nextn_predict_layers: int
    hidden_size: int
    vocab_size: int
    attention: tuple[LayerAttention, ...]
    cache_groups: tuple[CacheGroup, ...]
    intermediate_size: int | None
    experts: ExpertSpec | None
    norm_eps: float
    tied_embeddings: bool
    checkpoint_dtype: str
    tensors: tuple[TensorSpec, ...]

    @property
    def max_positions(self) -> int:
        """The most tokens that a sequence may have, prompt and output together."""
        return self._shortest_rope.max_positions

    @property
    def limit_reason(self) -> str | None:
        """Why not more, where the checkpoint itself would allow it."""
        return self._shortest_rope.limit_reason

    @property
    def head_counts(self) -> tuple[tuple[int, int], ...]:
        """The distinct pairs of query heads and KV heads of its layers."""
        pairs = ((layer.num_heads, self.group_of(index).num_kv_heads) for index, layer in enumerate(self.attention))
        return tuple(dict.fromkeys(pairs))

    def group_of(self, layer: int) -> CacheGroup:
        """The cache group of layer `layer`."""
        return next(group for group in self.cache_groups if layer in group.layers)

    @property
    def _shortest_rope(self) -> RopeSpec:
        return min((layer.rope for layer in self.attention), key=lambda rope: rope.max_positions)

    def has_experts(self, *, layer: int) -> bool:
        """Whether layer `layer` has experts in place of a dense feed-forward."""
        return self.experts is not None and layer in self.experts.layers


#: Builds a description from the values of a checkpoint's config.json; ValueError names the key that it cannot serve.
Describe = Callable[[dict[str, object]], ModelDescription]
