"""What the descriptions of decoder-only models share: the sizes in their config, attention's tensors, full KV."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from parallel.models.config_values import Config, count, number, positive, require
from parallel.models.description import (
    ExpertSpec,
    LayerAttention,
    ModelDescription,
    Part,
    Split,
    TensorSpec,
)
from parallel.models.rope import read_rope
from parallel.storage import EVERYTHING, CacheGroup, Sight, Window, keys_and_values

#: Each is described by itself, so a number that is a mistake must end before it is counted out.
_MAX_LAYERS = 10_000
#: The tensors of one layer, by its number.
LayerTensors = Callable[[int], Iterable[TensorSpec]]


def describe_decoder(
    config: Config,
    *,
    family: str,
    layer_tensors: LayerTensors,
    intermediate_size: int | None,
    experts: ExpertSpec | None = None,
    attention: Sequence[LayerAttention] = (),
    cache_groups: Sequence[CacheGroup] = (),
) -> ModelDescription:
    """The description of a pre-norm decoder with full attention; ValueError names what it cannot serve."""
    require(config, "hidden_act", "silu")
    require(config, "tie_word_embeddings", True, False, None)
    num_layers = layer_count(config)
    per_layer = (spec for layer in range(num_layers) for spec in layer_tensors(layer))
    return ModelDescription(
        family=family,
        num_layers=num_layers,
        num_nextn_predict_layers=count(config, "num_nextn_predict_layers"),
        hidden_size=positive(config, "hidden_size"),
        vocab_size=positive(config, "vocab_size"),
        attention=tuple(attention) or (layer_attention(config),) * num_layers,
        cache_groups=tuple(cache_groups) or (attention_group(config, "full", layers=range(num_layers)),),
        intermediate_size=intermediate_size,
        experts=experts,
        norm_eps=number(config, "rms_norm_eps", least=0.0, default=1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        checkpoint_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        tensors=(*outer_tensors(config), *per_layer),
    )


def layer_count(config: Config) -> int:
    """How many layers the config asks for."""
    return positive(config, "num_hidden_layers", most=_MAX_LAYERS)


def head_dim(config: Config) -> int:
    """The head size: given, or hidden_size / num_attention_heads."""
    return positive(
        config, "head_dim", default=positive(config, "hidden_size") // positive(config, "num_attention_heads")
    )


def require_full_attention(config: Config) -> None:
    """ValueError where a config that knows sliding windows enables them; one that is named but off is accepted."""
    require(config, "use_sliding_window", False)
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"config.json has layer_types = {kinds!r}: it must be a list of kinds")
    for layer, kind in enumerate(kinds):
        if kind != "full_attention":
            raise ValueError(f"config.json has layer_types[{layer}] = {kind!r}: only 'full_attention' runs yet")


def layer_attention(config: Config, *, may_be_partial_rope: bool = False) -> LayerAttention:
    """How every layer attends where all do alike."""
    return LayerAttention(
        num_heads=positive(config, "num_attention_heads"),
        rope=read_rope(config, head_dim=head_dim(config), may_be_partial=may_be_partial_rope),
        scale=head_dim(config) ** -0.5,
    )


def attention_group(config: Config, name: str, *, layers: Sequence[int], sees: Sight = EVERYTHING) -> CacheGroup:
    """A cache group of grouped-query attention: K and V of every KV head for each token, in `layers`."""
    heads = positive(config, "num_attention_heads")
    return keys_and_values(
        name,
        layers=layers,
        sees=sees,
        num_kv_heads=positive(config, "num_key_value_heads", default=heads),
        head_size=head_dim(config),
    )


def window_groups(config: Config, windows: Sequence[int | None]) -> list[CacheGroup]:
    """A cache group of the layers that see everything and one for each window, of those that there are."""
    sizes = sorted({window for window in windows if window is not None})
    found: list[tuple[str, Sight, int | None]] = [("full", EVERYTHING, None)]
    found += [(f"window {size}", Window(tokens=size), size) for size in sizes]
    return [
        attention_group(config, name, layers=layers, sees=sees)
        for name, sees, size in found
        if (layers := [layer for layer, window in enumerate(windows) if window == size])
    ]


def outer_tensors(config: Config) -> Iterator[TensorSpec]:
    """Embedding, last norm and output, which may be the embedding again."""
    vocabulary, hidden = positive(config, "vocab_size"), positive(config, "hidden_size")
    embedding = TensorSpec(
        name="model.embed_tokens.weight",
        shape=(vocabulary, hidden),
        part=Part.EMBEDDING,
        splits=((0, Split.VOCABULARY),),
    )
    yield embedding
    yield TensorSpec(name="model.norm.weight", shape=(hidden,), part=Part.OUTPUT)
    yield TensorSpec(
        name="lm_head.weight",
        shape=(vocabulary, hidden),
        part=Part.OUTPUT,
        splits=((0, Split.OUTPUT_VOCABULARY),),
        tied_to=embedding.name if config.get("tie_word_embeddings", False) else "",
    )


def attention_tensors(
    config: Config, *, layer: int, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False
) -> Iterator[TensorSpec]:
    """The two norms of a layer and its four projections; a bias is cut over ranks as its weight's rows are.

    That of o_proj, whose product is a sum over tp ranks, is added by the first of them.

    `qk_norm` adds the norms over one head of q and of k, which every rank holds whole.
    """
    hidden, size = positive(config, "hidden_size"), head_dim(config)
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", default=heads)
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(name=f"{prefix}.{norm}.weight", shape=(hidden,), part=Part.LAYER, layer=layer)
    for norm in ("self_attn.q_norm", "self_attn.k_norm") if qk_norm else ():
        yield TensorSpec(name=f"{prefix}.{norm}.weight", shape=(size,), part=Part.LAYER, layer=layer)
    for name, shape, split in (
        ("q_proj", (heads * size, hidden), (0, Split.QUERY_HEADS)),
        ("k_proj", (kv_heads * size, hidden), (0, Split.KV_HEADS)),
        ("v_proj", (kv_heads * size, hidden), (0, Split.KV_HEADS)),
        ("o_proj", (hidden, heads * size), (1, Split.QUERY_HEADS)),
    ):
        yield TensorSpec(
            name=f"{prefix}.self_attn.{name}.weight", shape=shape, part=Part.LAYER, layer=layer, splits=(split,)
        )
        if qkv_bias and name != "o_proj":
            yield TensorSpec(
                name=f"{prefix}.self_attn.{name}.bias", shape=shape[:1], part=Part.LAYER, layer=layer, splits=(split,)
            )
    if o_bias:
        yield TensorSpec(
            name=f"{prefix}.self_attn.o_proj.bias",
            shape=(hidden,),
            part=Part.LAYER,
            layer=layer,
            added_over=Split.QUERY_HEADS,
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


def dense_tensors(config: Config, *, layer: int) -> Iterator[TensorSpec]:
    """A dense feed-forward layer under the names of the Llama family."""
    yield from feed_forward_tensors(
        ("gate_proj", "up_proj", "down_proj"),
        prefix=f"model.layers.{layer}.mlp",
        hidden=positive(config, "hidden_size"),
        width=positive(config, "intermediate_size"),
        layer=layer,
        split=Split.DENSE_INTERMEDIATE,
    )
