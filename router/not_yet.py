"""What the algebra allows and the engine cannot run yet. The issue that brings every axis deletes this file."""

from collections.abc import Iterator

from parallel.shape import ReplicaShape
from router.problem import KeyPath


def not_yet(pool_name: str, shape: ReplicaShape) -> Iterator[tuple[KeyPath, str, str]]:
    """The key inside the pool, what is refused and the remedy, for each size that this version cannot run."""
    attention, experts = shape.attention, shape.experts
    sizes: list[tuple[KeyPath, int, str]] = [
        (("pp",), shape.pp, "pipeline stages"),
        (("attention", "tp"), attention.tp, "attention tensor parallelism"),
    ]
    if pool_name != "prefill":
        sizes.append((("attention", "cp"), attention.cp, f"context parallelism in a {pool_name} pool"))
    if experts is not None:
        sizes.append((("experts", "moe_dp"), experts.moe_dp, "data parallelism over blocks of experts"))
        sizes.append((("experts", "moe_tp"), experts.moe_tp, "tensor parallelism inside experts"))
    for path, size, subject in sizes:
        if size > 1:
            yield path, f"{subject} cannot run yet in this version", f"write {path[-1]}: 1"
