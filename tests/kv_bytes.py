"""What KV takes in published models, by cache group: writes docs/kv_bytes.md from their descriptions.

Run: `python -m tests.kv_bytes`.
"""

from collections.abc import Iterator
from pathlib import Path

from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage import CacheGroup
from tests.published_configs import PUBLISHED
from tests.tiny_models import describe

PAGE = Path(__file__).parents[1] / "docs" / "kv_bytes.md"
SETTINGS = EngineSettings(dtype="bfloat16", page_size=16, kv_tokens=1 << 20)
TPS = (1, 8)
SEQUENCE_TOKENS = 131_072
_HEADINGS = (
    "model",
    "group",
    "a query sees",
    "layers",
    *(f"bytes a token, tp {tp}" for tp in TPS),
    *(f"a sequence of {SEQUENCE_TOKENS:,} tokens, tp {tp}" for tp in TPS),
)
_ABOUT = f"""# What KV takes

Bytes on one rank of a stage that has all layers, in bfloat16, by cache group. A window keeps what its last query sees,
in pages of {SETTINGS.page_size}, and two pages more. Where tp is above the number of KV heads, ranks hold one alike.
Context-parallel ranks share a sequence's pages of groups that see everything; a window's may lie on any one of them.

"""


def page() -> str:
    """The whole of docs/kv_bytes.md."""
    rows = [_HEADINGS, ("---",) * 3 + ("---:",) * (len(_HEADINGS) - 3)]
    for model, config in PUBLISHED.items():
        rows += _rows(model, describe(config))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"{_ABOUT}{table}\n\nMade by `python -m tests.kv_bytes`.\n"


def _rows(model: str, description: ModelDescription) -> Iterator[tuple[str, ...]]:
    tokens_bytes = [token_bytes(description, tp=tp) for tp in TPS]
    for group in description.cache_groups:
        kept = kept_tokens(group)
        yield (
            model,
            group.name,
            f"{group.window} positions" if group.window else "everything",
            str(len(group.layers)),
            *(f"{by_group[group.name]:,}" for by_group in tokens_bytes),
            *(_size(kept * by_group[group.name]) for by_group in tokens_bytes),
        )


def token_bytes(description: ModelDescription, *, tp: int) -> dict[str, int]:
    """Bytes that one token takes on the first of `tp` ranks, by cache group."""
    shape = ReplicaShape(attention=AttentionSizes(tp=tp), experts=None)
    share = ModelShare(description=description, shape=shape, coordinates=shape.coordinates(0))
    return share.token_bytes(SETTINGS)


def kept_tokens(group: CacheGroup) -> int:
    """Tokens that a sequence of SEQUENCE_TOKENS keeps between its steps."""
    return SETTINGS.window_pages(group) * SETTINGS.page_size if group.window else SEQUENCE_TOKENS


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
