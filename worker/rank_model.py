"""Builds one rank's model: its weights, its KV memory, its kernels."""

from collections.abc import Callable
from pathlib import Path

import torch

from attention.interface import AttentionBackend, AttentionSpec
from parallel.groups import RankGroups
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import RankCoordinates, ReplicaShape
from parallel.sharding import rank_slices, stage_layers
from worker.blocks.parts import Parts, attention_spec
from worker.blocks.rope import RotaryEmbedding
from worker.kv_memory import KvMemory
from worker.models.decoder import Decoder
from worker.models.registry import build_layer
from worker.runner import RankModel
from worker.weights import load_weights


def build_model(
    folder: Path,
    description: ModelDescription,
    *,
    shape: ReplicaShape,
    coordinates: RankCoordinates,
    settings: EngineSettings,
    groups: RankGroups,
    memory: KvMemory,
    make_backend: Callable[[AttentionSpec], AttentionBackend],
    progress: Callable[[float], None],
) -> RankModel:
    """Blocking: reads this rank's slices of the checkpoint in `folder` and packs them."""
    dtype, device = memory.region.dtype, memory.region.device
    slices = rank_slices(description, shape=shape, coordinates=coordinates)
    weights = load_weights(folder, slices, dtype=dtype, device=device, progress=progress)
    spec = attention_spec(
        description,
        memory=memory,
        num_heads=description.num_heads // shape.attention.tp,
        page_size=settings.page_size,
    )
    backend = make_backend(spec)
    parts = Parts(description, weights=weights, groups=groups, memory=memory, spec=spec, backend=backend)
    layers = stage_layers(description, pp=shape.pp, pp_rank=coordinates.pp_rank)
    embedding = "model.embed_tokens.weight"
    model = RankModel(
        embedding=parts.embedding(embedding),
        decoder=Decoder(layers=[build_layer(parts, layer=layer) for layer in layers]),
        output=parts.output(
            norm="model.norm.weight", head=embedding if description.tied_embeddings else "lm_head.weight"
        ),
        backend=backend,
        rope=RotaryEmbedding(description.rope, head_dim=description.head_dim, device=device),
        dtype=dtype,
        device=device,
    )
    # A bias or a norm that the forward forgets would only make the tokens worse.
    assert not weights.unread, f"the forward of {description.family} leaves {sorted(weights.unread)} unread"
    return model


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of a setting's name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
