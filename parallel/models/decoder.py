"""The parts that the descriptions of decoder-only models share: config readers, attention's tensors, full KV."""

from collections.abc import Iterator, Mapping
from typing import Any

from parallel.models.description import CacheGroup, Part, RopeSpec, Split, StoredTensor, TensorSpec

Config = Mapping[str, Any]


def positive(config: Config, key: str, *, default: int | None = None) -> int:
    """The positive integer at `key`; ValueError names the key and the value."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {key} = {value!r}: it must be a positive integer")
    return value


def head_dim(config: Config) -> int:
    """The head size: given, or hidden_size / num_attention_heads."""
    return positive(
        config, "head_dim", default=positive(config, "hidden_size") // positive(config, "num_attention_heads")
    )


def rope(config: Config) -> RopeSpec:
    """The rotary embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json asks for rope type {kind!r}: only 'default' runs yet")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    return RopeSpec(theta=float(theta))


def require(config: Config, key: str, *allowed: object) -> None:
    """ValueError unless `key` is absent or one of `allowed`: the forward computes nothing else."""
    if key in config and config[key] not in allowed:
        raise ValueError(f"config.json has {key} = {config[key]!r}: only {', '.join(map(repr, allowed))} runs yet")


def full_attention(*, num_layers: int, head_size: int) -> tuple[CacheGroup, ...]:
    """One cache group: K and V of every KV head for each token, in every layer."""
    stored = tuple(StoredTensor(name=name, size=head_size, per_head=True) for name in ("k", "v"))
    return (CacheGroup(name="full", layers=tuple(range(num_layers)), per_token=stored),)


def outer_tensors(config: Config) -> Iterator[TensorSpec]:
    """Embedding, last norm and, unless tied, output."""
    vocabulary, hidden = positive(config, "vocab_size"), positive(config, "hidden_size")
    by_vocabulary = ((0, Split.VOCABULARY),)
    yield TensorSpec(
        name="model.embed_tokens.weight", shape=(vocabulary, hidden), part=Part.EMBEDDING, splits=by_vocabulary
    )
    yield TensorSpec(name="model.norm.weight", shape=(hidden,), part=Part.OUTPUT)
    if not config.get("tie_word_embeddings", False):
        yield TensorSpec(name="lm_head.weight", shape=(vocabulary, hidden), part=Part.OUTPUT, splits=by_vocabulary)


def attention_tensors(config: Config, *, layer: int) -> Iterator[TensorSpec]:
    """The two norms of a layer and its four projections."""
    hidden, size = positive(config, "hidden_size"), head_dim(config)
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", default=heads)
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(name=f"{prefix}.{norm}.weight", shape=(hidden,), part=Part.LAYER, layer=layer)
    for name, shape, split in (
        ("q_proj", (heads * size, hidden), (0, Split.QUERY_HEADS)),
        ("k_proj", (kv_heads * size, hidden), (0, Split.KV_HEADS)),
        ("v_proj", (kv_heads * size, hidden), (0, Split.KV_HEADS)),
        ("o_proj", (hidden, heads * size), (1, Split.QUERY_HEADS)),
    ):
        yield TensorSpec(
            name=f"{prefix}.self_attn.{name}.weight", shape=shape, part=Part.LAYER, layer=layer, splits=(split,)
        )


def feed_forward_tensors(
    names: tuple[str, str, str],
    *,
    prefix: str,
    hidden: int,
    width: int,
    layer: int,
    split: Split,
    expert: int | None = None,
) -> Iterator[TensorSpec]:
    """Gate, up and down projection (`names`, in this order) of a feed-forward layer or of one expert."""
    gate, up, down = names
    for name, shape, dim in ((gate, (width, hidden), 0), (up, (width, hidden), 0), (down, (hidden, width), 1)):
        yield TensorSpec(
            name=f"{prefix}.{name}.weight",
            shape=shape,
            part=Part.LAYER,
            layer=layer,
            expert=expert,
            splits=((dim, split),),
        )
