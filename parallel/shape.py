"""The shape of a replica: its stages and the two meshes over each stage's ranks, and every group that follows.

```
attention mesh   W = dp · cp · tp            expert mesh   W = moe_dp · ep · moe_tp
global_rank = pp_rank · W + r                r is the rank inside its stage; both meshes are row-major over r
```
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from parallel.mesh import Mesh, divisors

#: Every axis of a replica with the mesh that holds it; `block` is the product axis ep x moe_tp, for dispatch, and
#: `output` all of a stage, where its ranks share the output's vocabulary.
ATTENTION_AXES = ("attn_dp", "attn_cp", "attn_tp")
EXPERT_AXES = ("moe_dp", "moe_ep", "moe_tp")
OUTPUT_AXIS = "output"
#: Along these, one rank sends to another what the others do not get.
MESSAGE_AXES = ("pp", "attn_cp")


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Sizes of the attention mesh's axes."""

    dp: int = 1
    cp: int = 1
    tp: int = 1


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Sizes of the expert mesh's axes.

    `placements` holds for each layer with experts the expert of each slot, or one for all of them, or none: then the
    slots are the experts in order.
    """

    moe_dp: int = 1
    ep: int = 1
    moe_tp: int = 1
    placements: tuple[tuple[int, ...], ...] = ()

    @property
    def block_ep_ranks(self) -> tuple[int, ...]:
        """The ep coordinate of each rank of a block of ep x moe_tp ranks, in order."""
        return tuple(ep_rank for ep_rank in range(self.ep) for _ in range(self.moe_tp))


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of a replica that differ in one axis only, or in those that it is the product of: `ranks` are global
    ranks, ascending.
    """

    axis: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RankCoordinates:
    """Every coordinate of one rank in its replica. The expert ones are None for a model without experts."""

    global_rank: int
    pp_rank: int
    attn_dp_rank: int
    attn_cp_rank: int
    attn_tp_rank: int
    moe_dp_rank: int | None
    moe_ep_rank: int | None
    moe_tp_rank: int | None


@dataclass(frozen=True, kw_only=True)
class ReplicaShape:
    """`pp` stages of W ranks, seen through an attention mesh and, for a model with experts, an expert mesh.

    `draws_every_token`: whether each token of a step is drawn from, as in decode, or, as where prompts are all, one of
    many. It decides how much the output weighs when layers are dealt to stages.

    `shares_output`: whether all ranks of a stage have a part of the output's vocabulary each, and multiply it with the
    rows of them all; else those of a tp group have. It pays where messages cost next to nothing, in memory that they
    share: on a GPU large batches draw, whose logits are no small message.
    """

    pp: int = 1
    attention: AttentionSizes
    experts: ExpertSizes | None
    draws_every_token: bool = True
    shares_output: bool = False

    def __post_init__(self) -> None:
        if self.pp < 1:
            raise ValueError(f"pp is {self.pp}: a size is 1 or more")
        # Built here, for a mesh refuses sizes below 1: two negative ones have a product that looks right.
        width = self.attention_mesh.size
        if self.expert_mesh is None or self.experts is None:
            return
        sizes = self.experts
        product = self.expert_mesh.size
        if product != width:
            attention = self.attention
            raise ValueError(
                f"the expert mesh has moe_dp {sizes.moe_dp} x ep {sizes.ep} x moe_tp {sizes.moe_tp} = {product} ranks, "
                f"the attention mesh dp {attention.dp} x cp {attention.cp} x tp {attention.tp} = {width}: both must "
                f"factor the same stage; {_remedy(sizes, width)}"
            )

    @cached_property
    def attention_mesh(self) -> Mesh:
        """The mesh (attn_dp, attn_cp, attn_tp) over one stage."""
        sizes = self.attention
        return Mesh(axes=(("attn_dp", sizes.dp), ("attn_cp", sizes.cp), ("attn_tp", sizes.tp)))

    @cached_property
    def expert_mesh(self) -> Mesh | None:
        """The mesh (moe_dp, moe_ep, moe_tp) over one stage, None for a model without experts."""
        sizes = self.experts
        if sizes is None:
            return None
        return Mesh(axes=(("moe_dp", sizes.moe_dp), ("moe_ep", sizes.ep), ("moe_tp", sizes.moe_tp)))

    @property
    def stage_size(self) -> int:
        """W: number of ranks of one stage."""
        return self.attention_mesh.size

    @property
    def world_size(self) -> int:
        """Number of ranks of the replica."""
        return self.pp * self.stage_size

    @property
    def ranks_per_sequence(self) -> int:
        """Ranks that hold parts of any one sequence: those of its dp coordinate, of all stages."""
        return self.world_size // self.attention.dp

    @cached_property
    def dp_ranks(self) -> tuple[int, ...]:
        """The dp coordinate of each rank of the replica."""
        return tuple(self.coordinates(rank).attn_dp_rank for rank in range(self.world_size))

    def coordinates(self, global_rank: int) -> RankCoordinates:
        """Every coordinate of `global_rank`."""
        if not 0 <= global_rank < self.world_size:
            raise ValueError(f"global rank {global_rank} is outside a replica of {self.world_size} ranks")
        pp_rank, stage_rank = divmod(global_rank, self.stage_size)
        attention = self.attention_mesh.coordinates(stage_rank)
        experts = self.expert_mesh.coordinates(stage_rank) if self.expert_mesh else {}
        return RankCoordinates(
            global_rank=global_rank,
            pp_rank=pp_rank,
            attn_dp_rank=attention["attn_dp"],
            attn_cp_rank=attention["attn_cp"],
            attn_tp_rank=attention["attn_tp"],
            moe_dp_rank=experts.get("moe_dp"),
            moe_ep_rank=experts.get("moe_ep"),
            moe_tp_rank=experts.get("moe_tp"),
        )

    def attention_rank(self, *, pp_rank: int = 0, dp: int, cp: int = 0, tp: int = 0) -> int:
        """The global rank at these coordinates of the attention mesh."""
        inside = self.attention_mesh.rank({"attn_dp": dp, "attn_cp": cp, "attn_tp": tp})
        return pp_rank * self.stage_size + inside

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that has groups, in the order in which groups are created."""
        output = (OUTPUT_AXIS,) if self.output_sharing > 1 else ()
        return ("pp", *ATTENTION_AXES, *((*EXPERT_AXES, "block") if self.experts else ()), *output)

    @property
    def output_sharing(self) -> int:
        """How many tp groups a part of the output meets the rows of: 1 where each has an output of its own."""
        return self.stage_size // self.attention.tp if self.shares_output else 1

    @property
    def output_axis(self) -> str:
        """The axis over which the output's vocabulary is split."""
        return OUTPUT_AXIS if self.output_sharing > 1 else "attn_tp"

    def group_of(self, global_rank: int, axis: str) -> Group:
        """The group of `global_rank` along `axis`, one of `axes`. Only pp's groups cross stages.

        Along the output's axis a rank of a stage before the last is alone.
        """
        pp_rank, stage_rank = divmod(global_rank, self.stage_size)
        if axis == "pp":
            ranks = tuple(stage * self.stage_size + stage_rank for stage in range(self.pp))
            return Group(axis=axis, ranks=ranks)
        if axis == OUTPUT_AXIS and pp_rank < self.pp - 1:
            return Group(axis=axis, ranks=(global_rank,))
        mesh, names = self._view(axis)
        base = pp_rank * self.stage_size
        return Group(axis=axis, ranks=tuple(base + rank for rank in mesh.group_of(stage_rank, *names)))

    def num_groups(self, axis: str) -> int:
        """How many groups there are along `axis`."""
        if axis == OUTPUT_AXIS:
            return (self.pp - 1) * self.stage_size + 1
        return self.world_size // len(self.first_group(axis).ranks)

    def first_group(self, axis: str) -> Group:
        """The first group along `axis`; of the output's, of which stages before the last have none, the one."""
        return self.group_of(self.world_size - self.stage_size if axis == OUTPUT_AXIS else 0, axis)

    def groups(self, axis: str) -> Iterator[Group]:
        """Every group along `axis`, ordered by first rank: together they hold each rank once."""
        width = self.stage_size
        if axis == "pp":
            for first in range(width):
                yield Group(axis=axis, ranks=tuple(range(first, self.world_size, width)))
            return
        mesh, names = self._view(axis)
        inside, first_base = list(mesh.groups(*names)), 0
        if axis == OUTPUT_AXIS:
            first_base = self.world_size - width
            for rank in range(first_base):
                yield Group(axis=axis, ranks=(rank,))
        for base in range(first_base, self.world_size, width):
            for ranks in inside:
                yield Group(axis=axis, ranks=tuple(base + rank for rank in ranks))

    def creation_order(self) -> tuple[tuple[int, ...], ...]:
        """The distinct sets of two or more ranks that need a communicator, in the order all ranks create them in."""
        seen: dict[tuple[int, ...], None] = {}
        for axis in self.axes:
            for group in self.groups(axis):
                if len(group.ranks) > 1:
                    seen.setdefault(group.ranks)
        return tuple(seen)

    def creation_order_of(self, global_rank: int) -> tuple[tuple[int, ...], ...]:
        """The part of `creation_order` that `global_rank` is in, worked out without walking the whole replica."""
        seen: dict[tuple[int, ...], None] = {}
        for axis in self.axes:
            ranks = self.group_of(global_rank, axis).ranks
            if len(ranks) > 1:
                seen.setdefault(ranks)
        return tuple(seen)

    def _view(self, axis: str) -> tuple[Mesh, tuple[str, ...]]:
        if axis == OUTPUT_AXIS:
            return self.attention_mesh, ATTENTION_AXES
        if axis in ATTENTION_AXES:
            return self.attention_mesh, (axis,)
        if self.expert_mesh is None:
            raise ValueError(f"no axis {axis} in a replica without experts")
        if axis == "block":
            return self.expert_mesh, ("moe_ep", "moe_tp")
        return self.expert_mesh, (axis,)


def _remedy(sizes: ExpertSizes, width: int) -> str:
    """What to write instead: the legal ep where the two others fit, else what those two may come to."""
    rest = sizes.moe_dp * sizes.moe_tp
    if width % rest == 0:
        return f"with moe_dp {sizes.moe_dp} and moe_tp {sizes.moe_tp}, ep must be {width // rest}"
    nearest = min(divisors(width), key=lambda size: (abs(size - rest), size))
    legal = ", ".join(map(str, divisors(width)))
    return (
        f"no ep fits moe_dp {sizes.moe_dp} x moe_tp {sizes.moe_tp} = {rest}, which does not divide {width}: make that "
        f"product one of {legal} (nearest: {nearest})"
    )
