"""The hand-off of a step's chunks, layer by layer while the forward runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from worker.device import completion
from worker.handoff.plan import layer_parts
from worker.handoff.sender import ComputedPart
from worker.step.sequences import HandedChunk


class Outgoing(Protocol):
    """What a step hands off."""

    def on_layer(self, index: int) -> None:
        """The stage's layer `index` has been launched."""
        ...


class HandOff(Protocol):
    """What a runner calls; a rank of a unified pool has nothing to hand off."""

    def begin(self, items: Sequence[HandedChunk]) -> Outgoing:
        """A step begins that computes `items`, whose sequences have targets."""
        ...


class NoHandOff:
    """Of a unified pool, and of decode."""

    def begin(self, items: Sequence[HandedChunk]) -> "NoHandOff":
        """See HandOff."""
        assert not items, "this pool hands nothing off"
        return self

    def on_layer(self, index: int) -> None:
        """Nothing to send."""


@dataclass(frozen=True, kw_only=True)
class _ChunkParts:
    item: HandedChunk
    by_last_layer: dict[int, range]


class _LayerWise:
    """See Outgoing: each part of a chunk's layers goes when its last layer has been launched."""

    def __init__(
        self,
        chunks: Sequence[_ChunkParts],
        *,
        num_layers: int,
        send: Callable[[ComputedPart], None],
        device: torch.device,
    ) -> None:
        self._chunks = chunks
        self._num_layers = num_layers
        self._send = send
        self._device = device

    def on_layer(self, index: int) -> None:
        """See Outgoing."""
        ending = [(chunk.item, chunk.by_last_layer[index]) for chunk in self._chunks if index in chunk.by_last_layer]
        if not ending:
            return
        wait = completion(self._device)
        for item, layers in ending:
            is_last = layers.stop == self._num_layers
            self._send(ComputedPart(item=item, layers=layers, is_last=is_last, wait=wait))


class LayerWiseHandOff:
    """See HandOff, over the thread that writes. `token_bytes` is what one token takes in one layer on this rank."""

    def __init__(
        self,
        *,
        send: Callable[[ComputedPart], None],
        num_layers: int,
        token_bytes: int,
        device: torch.device,
    ) -> None:
        self._send = send
        self._num_layers = num_layers
        self._token_bytes = token_bytes
        self._device = device

    def begin(self, items: Sequence[HandedChunk]) -> Outgoing:
        """See HandOff."""
        chunks = [_ChunkParts(item=item, by_last_layer=self._parts(item)) for item in items]
        return _LayerWise(chunks, num_layers=self._num_layers, send=self._send, device=self._device)

    def _parts(self, item: HandedChunk) -> dict[int, range]:
        parts = layer_parts(self._num_layers, layer_bytes=item.own_tokens * self._token_bytes)
        return {layers.stop - 1: layers for layers in parts}
