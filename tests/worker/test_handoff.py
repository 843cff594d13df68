"""The thread that writes a hand-off, over a transport inside this process: what arrives, what is reported, and whom it
still knows.
"""

import ctypes
import queue

import numpy as np

from parallel.handoff import PagePlace, cache_layout
from parallel.model_share import ModelShare
from parallel.page_table import PageTable
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.wire import sizes_to_wire
from proto import control_pb2, step_pb2
from tests import tiny_models
from worker.handoff.plan import HandoffSource, SourceMemory
from worker.handoff.thread import ComputedPart, HandoffThread
from worker.handoff.transport.interface import WriteRuns
from worker.step.rows import PlacedChunk, RankSequence, page_places

MODEL = tiny_models.describe(tiny_models.llama(num_hidden_layers=3))
SHAPE = ReplicaShape(attention=AttentionSizes(), experts=None)
PAGE, NUM_PAGES = 4, 6


def memory() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """KV of all layers: [layer, page, 2, head, position, head_dim]."""
    return np.zeros((MODEL.num_layers, NUM_PAGES, 2, MODEL.num_kv_heads, PAGE, MODEL.head_dim), dtype=np.float32)


class InProcessTransport:
    """Writes into memory of this process; each write is done one look after it was begun."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.is_closed = False
        self._count = 0
        self._pending: set[int] = set()

    def endpoint(self) -> control_pb2.Endpoint:
        raise AssertionError("nobody writes here")

    def connect(self, endpoint: control_pb2.Endpoint) -> str:
        self.peers.append(endpoint.agent.decode())
        return self.peers[-1]

    def disconnect(self, peer: str) -> None:
        self.peers.remove(peer)

    def write(self, peer: str, runs: WriteRuns, *, target_device: int) -> object:
        assert peer in self.peers
        for source, target, size in runs.tolist():
            ctypes.memmove(target, source, size)
        self._count += 1
        self._pending.add(self._count)
        return self._count

    def is_done(self, handle: object) -> bool:
        assert isinstance(handle, int)
        was_pending = handle in self._pending
        self._pending.discard(handle)
        return not was_pending

    def progress(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class Side:
    """A running thread with its source memory, and what it reported."""

    def __init__(self) -> None:
        self.kv = memory()
        self.kv[:] = np.random.default_rng(0).random(self.kv.shape)
        self.transport = InProcessTransport()
        self.reports: queue.Queue[step_pb2.WritesDone] = queue.Queue()
        self.errors: list[BaseException] = []
        self.thread = HandoffThread(
            self.transport,
            source=HandoffSource(
                share=ModelShare(description=MODEL, shape=SHAPE, coordinates=SHAPE.coordinates(0)),
                layout=cache_layout(MODEL, shape=SHAPE, page_size=PAGE),
                memory=SourceMemory(
                    base_address=self.kv.ctypes.data,
                    layer_bytes=self.kv[0].nbytes,
                    element_bytes=4,
                    token_elements=MODEL.head_dim,
                ),
            ),
            receives=True,
            report=self.reports.put,
            fail=self.errors.append,
        )

    def meet(self, target: np.ndarray[tuple[int, ...], np.dtype[np.float32]], *, epoch: int) -> None:
        """Makes the decode replica with `target` as its memory known."""
        endpoint = control_pb2.Endpoint(
            agent=f"epoch {epoch}".encode(), base_address=target.ctypes.data, layer_bytes=target[0].nbytes
        )
        peer = control_pb2.Peer(
            replica="decode/0",
            epoch=epoch,
            sizes=sizes_to_wire(SHAPE),
            page_size=PAGE,
            endpoints=[endpoint.SerializeToString()],
        )
        self.thread.connect(peer)

    def send(self, request_id: int, *, epoch: int, layers: range) -> None:
        """Two pages of a sequence, 0 and 1 here, 3 and 2 there, in `layers`."""
        pages = [control_pb2.Page(page=page) for page in (3, 2)]
        sequence = RankSequence(
            slot=0,
            request_id=request_id,
            sampling=control_pb2.Sampling(),
            target=control_pb2.Target(replica="decode/0", epoch=epoch, pages=pages),
            target_places=page_places(pages),
            table=PageTable(cp=1, places=[PagePlace(coordinate=0, page=page) for page in (0, 1)]),
        )
        item = PlacedChunk(
            sequence=sequence,
            chunk=step_pb2.Chunk(cached_tokens=0, new_tokens=2 * PAGE),
            segments=(),
            handoff_start=0,
        )
        is_last = layers.stop == MODEL.num_layers
        self.thread.send(ComputedPart(item=item, layers=layers, is_last=is_last, wait=lambda: None))

    def report(self) -> step_pb2.WritesDone:
        return self.reports.get(timeout=10)


def test_a_chunk_is_reported_once_after_its_last_layer_with_all_its_bytes() -> None:
    side, target = Side(), memory()
    side.meet(target, epoch=1)
    for layer in range(MODEL.num_layers):
        assert side.reports.empty()
        side.send(7, epoch=1, layers=range(layer, layer + 1))
    done = side.report()
    side.thread.close()
    assert (done.request_id, done.end_position, done.bytes) == (7, 2 * PAGE, 2 * side.kv[:, 0].nbytes)
    assert np.array_equal(target[:, [3, 2]], side.kv[:, [0, 1]])
    assert not target[:, [0, 1, 4, 5]].any()
    assert side.reports.empty() and not side.errors and side.transport.is_closed


def test_a_targets_later_epoch_takes_the_place_of_the_earlier_ones() -> None:
    side = Side()
    targets = [memory() for _ in range(20)]
    for epoch, target in enumerate(targets, 1):
        side.meet(target, epoch=epoch)
        side.send(epoch, epoch=epoch, layers=range(MODEL.num_layers))
        assert side.report().request_id == epoch
    side.send(99, epoch=20, layers=range(MODEL.num_layers))
    side.report()
    side.thread.close()
    assert side.transport.peers == ["epoch 20"]
    for target in targets:
        assert np.array_equal(target[:, [3, 2]], side.kv[:, [0, 1]])
    assert not side.errors


def test_what_is_left_for_a_replaced_epoch_is_not_written_and_still_reported() -> None:
    side, old, new = Side(), memory(), memory()
    side.meet(old, epoch=1)
    side.meet(new, epoch=2)
    side.send(1, epoch=2, layers=range(MODEL.num_layers))
    assert side.report().bytes  # by now the first epoch is forgotten
    side.send(2, epoch=1, layers=range(MODEL.num_layers))
    done = side.report()
    side.thread.close()
    assert (done.request_id, done.bytes) == (2, 0)
    assert not old.any() and not side.errors


def test_a_chunk_that_is_under_way_ends_in_the_epoch_that_it_began_in() -> None:
    side, old, new = Side(), memory(), memory()
    side.meet(old, epoch=1)
    side.send(1, epoch=1, layers=range(1))
    side.meet(new, epoch=2)
    side.send(1, epoch=1, layers=range(1, MODEL.num_layers))
    assert side.report().bytes == 2 * side.kv[:, 0].nbytes
    side.thread.close()
    assert np.array_equal(old[:, [3, 2]], side.kv[:, [0, 1]]) and not new.any()


def test_an_epoch_that_was_never_introduced_ends_the_rank() -> None:
    side = Side()
    side.meet(memory(), epoch=1)
    side.send(1, epoch=2, layers=range(1))
    side.thread.close()
    assert "not known in epoch 2" in str(side.errors[0])
