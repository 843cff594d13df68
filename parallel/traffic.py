"""How many bytes the ranks send to each other: per step along each axis, and per prompt token in a hand-off. Pure.

Counted for a full step, per rank, of the model's own collectives: what the rank sends, not what it receives. The plan
of a step (the control star) is not counted; along attn_dp and moe_dp nothing moves.

Letters: T new tokens of a dp coordinate, R = ceil(T / cp) rows of a cp coordinate, L = ceil(R / tp) rows of a rank,
S sequences that draw a token, D = ceil(S / (cp · tp)) draws of a rank, H hidden size, V vocabulary, e bytes of an
element, k experts of a row, B = ep · moe_tp ranks of a block. What is uneven in a real step is taken as even here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from parallel.handoff import plan_lanes
from parallel.model_share import ModelShare
from parallel.models.description import ModelDescription
from parallel.settings import EngineSettings
from parallel.shape import OUTPUT_AXIS, ReplicaShape
from parallel.sharding import stage_layers
from parallel.storage import DTYPE_BYTES, CacheGroup

#: Expert ids (int32) and weights (float32) that go with a row, log-sum-exps and logits (float32), token ids (int64).
_CHOICE_BYTES = 8
_FLOAT_BYTES = 4
_ID_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class AxisTraffic:
    """What one rank sends along `axis`, to the other ranks of its group of `size`; `what` says it in words.

    `cached_bytes` come on top for each 1000 cached tokens that the step's sequences have already.
    """

    axis: str
    size: int
    sent_bytes: int
    what: str
    cached_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """The traffic of a full step of the ranks of stage `pp_rank` of a replica of `pool`.

    T is `max_sequences` in decode, `max_batch_tokens` elsewhere; S is the lesser of T and `max_sequences`.
    """

    description: ModelDescription
    shape: ReplicaShape
    settings: EngineSettings
    pool: str
    pp_rank: int

    def axes(self) -> Iterator[AxisTraffic]:
        """Every axis of two or more ranks along which anything moves, in the order in which groups are created."""
        attention = self.shape.attention
        if self.shape.pp > 1 and not (self._is_last and self.pool == "prefill"):
            yield self._pipeline()
        if attention.cp > 1:
            yield self._pass_queries() if self.pool == "decode" else self._gather_kv()
        if attention.tp > 1:
            yield self._tensor()
        if self._block_size > 1:
            yield self._experts()
        if self._is_last and self.shape.output_sharing > 1:
            yield self._output()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.settings.step_tokens(self.pool)

    def _pipeline(self) -> AxisTraffic:
        """Each rank's rows to the same rank of the next stage, L·H·e; the last stage's drawn tokens to the first, 8·S.

        Tokens that prefill draws are embedded elsewhere: its last stage sends nothing.
        """
        sent = self._num_drawn * _ID_BYTES if self._is_last else self._row_bytes
        what = "drawn tokens to the first stage" if self._is_last else "rows to the next stage"
        return AxisTraffic(axis="pp", size=self.shape.pp, sent_bytes=sent, what=what)

    def _gather_kv(self) -> AxisTraffic:
        """What the rank's own share of new and cached tokens stores in its layers: to all other cp ranks. Of a window
        no more than that is cached.
        """
        groups = list(self._groups())
        windows = sum(self._stored_bytes(group, group.window) for group in groups if group.window)
        return AxisTraffic(
            axis="attn_cp",
            size=self.shape.attention.cp,
            sent_bytes=windows + sum(self._stored_bytes(group, self.num_tokens) for group in groups),
            what="KV of new tokens",
            cached_bytes=sum(self._stored_bytes(group, 1000) for group in groups if not group.window),
        )

    def _stored_bytes(self, group: CacheGroup, tokens: int) -> int:
        """(cp - 1) · ceil(tokens / cp) · bytes of a token in the group's layers on this rank."""
        cp = self.shape.attention.cp
        return (cp - 1) * -(-tokens // cp) * self._share.token_bytes(self.settings)[group.name]

    def _pass_queries(self) -> AxisTraffic:
        """Each layer: R queries to the other cp ranks with the new KV of their rows, as many outputs with a log-sum-exp
        back: (cp - 1) · R · (heads · ((key + value) · e + 4) + bytes of a token). What a window sees is at home.
        """
        cp, sent = self.shape.attention.cp, 0
        for group in self._groups():
            if not group.window:
                layers = [layer for layer in group.layers if layer in self._share.layers]
                heads = sum(self._share.num_heads(layer) for layer in layers)
                per_row = heads * ((group.key.width + group.value.width) * self._element + _FLOAT_BYTES)
                sent += (cp - 1) * self._rows * (per_row + self._share.token_bytes(self.settings)[group.name])
        what = "queries and their new KV out, partial outputs back"
        return AxisTraffic(axis="attn_cp", size=cp, sent_bytes=sent, what=what)

    def _groups(self) -> Iterator[CacheGroup]:
        """Those that have a layer on this stage."""
        for group in self.description.cache_groups:
            if any(layer in self._share.layers for layer in group.layers):
                yield group

    def _tensor(self) -> AxisTraffic:
        """A gather and a reduce-scatter of rows a block, (tp - 1)·L·H·e each; embedding and output on the end stages.

        Blocks of a layer: attention, and a dense feed-forward or a shared expert. The embedding is one reduce-scatter;
        the output, unless the whole stage shares it, gathers D rows, D·H·e, and sends logits, D·ceil(V / tp)·4, to
        each of the tp - 1 others.
        """
        tp, experts = self.shape.attention.tp, self.description.experts
        has_shared = experts is not None and experts.shared_width > 0
        blocks = 2 * self._num_layers - (0 if has_shared else self._num_expert_layers)
        sent = 2 * blocks * self._row_bytes
        if self.pp_rank == 0:
            sent += self._row_bytes
        if self._is_last and self.shape.output_sharing == 1:
            sent += self._draws * self._draw_bytes(tp)
        what = "rows gathered and scattered around each block"
        return AxisTraffic(axis="attn_tp", size=tp, sent_bytes=(tp - 1) * sent, what=what)

    def _experts(self) -> AxisTraffic:
        """By gather and reduce-scatter, for each layer of experts: (B - 1) · L · (2·H·e + 8·k).

        An all-to-all never sends more.
        """
        assert self.description.experts is not None
        rows = (self._block_size - 1) * self._local_rows
        top_k = self.description.experts.top_k
        per_row = 2 * self.description.hidden_size * self._element + _CHOICE_BYTES * top_k
        sent = self._num_expert_layers * rows * per_row
        return AxisTraffic(axis="block", size=self._block_size, sent_bytes=sent, what="rows to the experts and back")

    def _output(self) -> AxisTraffic:
        """As a tp group's, over the W ranks of a stage: (W - 1) · D · (H·e + ceil(V / W)·4)."""
        size = self.shape.stage_size
        sent = (size - 1) * self._draws * self._draw_bytes(size)
        return AxisTraffic(axis=OUTPUT_AXIS, size=size, sent_bytes=sent, what="rows to the output, and logits back")

    def _draw_bytes(self, size: int) -> int:
        """Of a row that is drawn from, to each of the others of `size` ranks: the row, and its logits of one part."""
        logits = -(-self.description.vocab_size // size) * _FLOAT_BYTES
        return self.description.hidden_size * self._element + logits

    @property
    def _element(self) -> int:
        return self.settings.dtype_bytes

    @property
    def _rows(self) -> int:
        return -(-self.num_tokens // self.shape.attention.cp)

    @property
    def _local_rows(self) -> int:
        return -(-self._rows // self.shape.attention.tp)

    @property
    def _row_bytes(self) -> int:
        return self._local_rows * self.description.hidden_size * self._element

    @property
    def _is_last(self) -> bool:
        return self.pp_rank == self.shape.pp - 1

    @property
    def _num_drawn(self) -> int:
        """S."""
        return min(self.num_tokens, self.settings.max_sequences)

    @property
    def _draws(self) -> int:
        return -(-self._num_drawn // (self.shape.attention.cp * self.shape.attention.tp))

    @property
    def _num_layers(self) -> int:
        return len(self._layers)

    @property
    def _num_expert_layers(self) -> int:
        return sum(self.description.has_experts(layer=layer) for layer in self._layers)

    @property
    def _layers(self) -> range:
        return stage_layers(self.description, shape=self.shape, pp_rank=self.pp_rank)

    @cached_property
    def _share(self) -> ModelShare:
        """Of the stage's first rank: all have as much."""
        first = self.shape.attention_rank(pp_rank=self.pp_rank, dp=0)
        return ModelShare(description=self.description, shape=self.shape, coordinates=self.shape.coordinates(first))

    @property
    def _block_size(self) -> int:
        experts = self.shape.experts
        return experts.ep * experts.moe_tp if experts else 1


def busiest_traffic(
    description: ModelDescription, *, shape: ReplicaShape, settings: EngineSettings, pool: str
) -> tuple[AxisTraffic, ...]:
    """For each axis what a rank of the stage that sends most along it sends in a full step."""
    found: dict[str, AxisTraffic] = {}
    for pp_rank in range(shape.pp):
        stage = StepTraffic(description=description, shape=shape, settings=settings, pool=pool, pp_rank=pp_rank)
        for traffic in stage.axes():
            if traffic.axis not in found or found[traffic.axis].sent_bytes < traffic.sent_bytes:
                found[traffic.axis] = traffic
    return tuple(found.values())


def handoff_bytes_per_token(
    description: ModelDescription, *, source: ReplicaShape, target: ReplicaShape, settings: EngineSettings
) -> int:
    """Bytes that are written for one prompt token: every target rank's own, so heads that tp repeats count again. Of a
    window's layers only the end of a prompt is written, however long it is: they are not counted.
    """
    groups = {group.name: group for group in description.cache_groups if not group.window}
    total = 0
    for lane in plan_lanes(description, source=source, target=target):
        if lane.group not in groups:
            continue
        planes = [plane for plane in groups[lane.group].planes if plane.per_head == (lane.heads is not None)]
        elements = sum(plane.elements * DTYPE_BYTES[plane.dtype or settings.dtype] for plane in planes)
        total += elements * lane.num_heads * len(lane.layers)
    return total
