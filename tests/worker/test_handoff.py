"""The thread that writes a hand-off, over a transport inside this process: what arrives, what is reported, whom it
still knows, and what becomes of writes that fail or do not end.
"""

import ctypes
import queue
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from parallel.model_share import ModelShare
from parallel.page_columns import PageColumns
from parallel.settings import EngineSettings
from parallel.shape import AttentionSizes, ReplicaShape
from parallel.storage_wire import storage_to_wire
from parallel.wire import sizes_to_wire
from proto import control_pb2, step_pb2
from tests import tiny_models
from worker.handoff.plan import HandoffSource
from worker.handoff.sender import ComputedPart, HandoffSender
from worker.handoff.transport.interface import WriteFailedError, WriteRuns
from worker.step.sequences import HandedChunk, RankSequence, TablePart

MODEL = tiny_models.describe(tiny_models.llama(num_hidden_layers=3))
SHAPE = ReplicaShape(attention=AttentionSizes(), experts=None)
PAGE, NUM_PAGES = 4, 6
SHARE = ModelShare(description=MODEL, shape=SHAPE, coordinates=SHAPE.coordinates(0))
STORAGE = SHARE.storage(EngineSettings(page_size=PAGE, kv_tokens=(NUM_PAGES - 1) * PAGE))


def memory() -> npt.NDArray[np.uint8]:
    """KV of all layers: [layer, page, bytes]."""
    return np.zeros((MODEL.num_layers, NUM_PAGES, STORAGE.groups[0].page.page_bytes), dtype=np.uint8)


class InProcessTransport:
    """Writes into memory of this process. A write is done one look after it was begun, unless its target stands still
    or is in `broken`: then it fails, to begin with or after it was begun.
    """

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.num_connects = 0
        self.is_closed = False
        self.still: set[str] = set()
        self.refusing: set[str] = set()
        self.broken: set[str] = set()
        self._count = 0
        self._pending: dict[int, str] = {}

    def connect(self, endpoint: control_pb2.Endpoint) -> str:
        self.num_connects += 1
        self.peers.append(endpoint.agent.decode())
        return self.peers[-1]

    def disconnect(self, peer: str) -> None:
        self.peers.remove(peer)

    def write(self, peer: str, runs: WriteRuns, *, target_device: int) -> object:
        assert peer in self.peers
        if peer in self.refusing:
            raise WriteFailedError("it has not begun")
        for source, target, size in runs.tolist() if peer not in self.still | self.broken else []:
            ctypes.memmove(target, source, size)
        self._count += 1
        self._pending[self._count] = peer
        return self._count

    def is_done(self, handle: object) -> bool:
        assert isinstance(handle, int)
        peer = self._pending.get(handle)
        if peer in self.still:
            return False
        self._pending.pop(handle, None)
        if peer in self.broken:
            raise WriteFailedError("it broke off")
        return peer is None

    def close(self) -> None:
        self.is_closed = True


def pages(*numbers: int) -> TablePart:
    """A table of pages of one cp rank."""
    columns = PageColumns(cp_ranks=np.zeros(len(numbers), dtype=np.int32), pages=np.array(numbers, dtype=np.int32))
    return TablePart(first_page=0, columns=columns)


class Side:
    """A running thread with its source memory, and what it reported."""

    def __init__(self, *, write_timeout_s: float = 60) -> None:
        self.kv = memory()
        self.kv[:] = np.random.default_rng(0).integers(1, 256, self.kv.shape)
        self.transport = InProcessTransport()
        self.reports: queue.Queue[step_pb2.FromMember] = queue.Queue()
        self.errors: list[BaseException] = []
        self.unanswered: list[int] = []
        self.num_answered = 0
        self.thread = HandoffSender(
            self.transport,
            source=HandoffSource(share=SHARE, storage=STORAGE, base_address=self.kv.ctypes.data),
            write_timeout_s=write_timeout_s,
            device=torch.device("cpu"),
            report=self.reports.put,
            fail=self.errors.append,
        )

    def meet(self, target: npt.NDArray[np.uint8], *, epoch: int, waits: bool = True) -> None:
        """Makes the decode replica with `target` as its memory known."""
        endpoint = control_pb2.Endpoint(
            agent=f"epoch {epoch}".encode(), base_address=target.ctypes.data, groups=storage_to_wire(STORAGE)
        )
        connect = control_pb2.ConnectTarget(sizes=sizes_to_wire(SHAPE), endpoints=[endpoint.SerializeToString()])
        self.order(control_pb2.PeerOrder(replica="decode/0", epoch=epoch, connect_target=connect))
        if waits:
            self.assert_answered()

    def forget(self, *, epoch: int, is_dead: bool = False) -> None:
        """Orders that the decode replica be forgotten."""
        forget = control_pb2.ForgetTarget(is_dead=is_dead)
        self.order(control_pb2.PeerOrder(replica="decode/0", epoch=epoch, forget_target=forget))

    def order(self, order: control_pb2.PeerOrder) -> None:
        """Gives an order; each has a number of its own."""
        self.unanswered.append(len(self.unanswered) + self.num_answered + 1)
        order.order_id = self.unanswered[-1]
        self.thread.take(order)

    def send(self, request_id: int, *, epoch: int, layers: range) -> None:
        """Two pages of a sequence, 0 and 1 here, 3 and 2 there, in `layers`."""
        sequence = RankSequence(
            request_id=request_id,
            sampling=control_pb2.Sampling(),
            prompt_end=2 * PAGE,
            target=control_pb2.Target(replica="decode/0", epoch=epoch),
            target_pages=(pages(3, 2),),
        )
        item = HandedChunk(sequence=sequence, start=0, end=2 * PAGE, own_tokens=2 * PAGE, sources=(pages(0, 1),))
        is_last = layers.stop == MODEL.num_layers
        self.thread.send(ComputedPart(item=item, layers=layers, is_last=is_last, wait=lambda: None))

    def report(self) -> step_pb2.WritesDone:
        report = self.reports.get(timeout=10)
        assert report.WhichOneof("message") == "writes", report
        return report.writes

    def failure(self) -> step_pb2.WritesFailed:
        report = self.reports.get(timeout=10)
        assert report.WhichOneof("message") == "writes_failed", report
        return report.writes_failed

    def assert_answered(self) -> None:
        """The next report answers the oldest order that has no answer yet."""
        assert self.reports.get(timeout=10).peer_answer.order_id == self.unanswered.pop(0)
        self.num_answered += 1

    def assert_silent(self) -> None:
        """Nothing is reported, for as long as one may wait."""
        with pytest.raises(queue.Empty):
            self.reports.get(timeout=0.1)


def test_a_chunk_is_reported_once_after_its_last_layer_with_all_its_bytes() -> None:
    side, target = Side(), memory()
    side.meet(target, epoch=1)
    for layer in range(MODEL.num_layers):
        assert side.reports.empty()
        side.send(7, epoch=1, layers=range(layer, layer + 1))
    done = side.report()
    side.thread.close()
    assert (done.request_id, done.end_position, done.bytes) == (7, 2 * PAGE, 2 * side.kv[:, 0].nbytes)
    assert not done.may_land
    assert np.array_equal(target[:, [3, 2]], side.kv[:, [0, 1]])
    assert not target[:, [0, 1, 4, 5]].any()
    assert side.reports.empty() and not side.errors and side.transport.is_closed


def test_nothing_is_kept_of_twenty_epochs_that_were_forgotten() -> None:
    side = Side()
    targets = [memory() for _ in range(20)]
    for epoch, target in enumerate(targets, 1):
        side.meet(target, epoch=epoch)
        side.send(epoch, epoch=epoch, layers=range(MODEL.num_layers))
        assert side.report().request_id == epoch
        side.forget(epoch=epoch)
        side.assert_answered()
        assert not side.transport.peers
    side.thread.close()
    for target in targets:
        assert np.array_equal(target[:, [3, 2]], side.kv[:, [0, 1]])
    assert not side.errors


def test_what_is_left_for_a_forgotten_epoch_is_not_written_and_ends_its_hand_off() -> None:
    side, old, new = Side(), memory(), memory()
    side.meet(old, epoch=1)
    side.forget(epoch=1)
    side.assert_answered()
    side.meet(new, epoch=2)
    side.send(2, epoch=1, layers=range(MODEL.num_layers))
    assert "not there any more" in side.failure().reason
    done = side.report()
    side.thread.close()
    assert (done.request_id, done.bytes, done.may_land) == (2, 0, False)
    assert not old.any() and not new.any() and not side.errors


def test_a_target_is_forgotten_only_when_no_write_to_it_is_under_way() -> None:
    side, target = Side(), memory()
    side.meet(target, epoch=1)
    side.transport.still.add("epoch 1")
    side.send(1, epoch=1, layers=range(MODEL.num_layers))
    side.forget(epoch=1)
    side.assert_silent()
    # What is ordered from now on does not keep it waiting.
    side.send(2, epoch=1, layers=range(MODEL.num_layers))
    assert side.failure().request_id == 2
    assert side.report().request_id == 2
    side.transport.still.clear()
    assert side.report().request_id == 1
    side.assert_answered()
    side.thread.close()
    assert not side.errors


@pytest.mark.parametrize("forgets", [False, True])
def test_a_target_that_is_connected_again_is_so_when_no_write_to_it_is_under_way(forgets: bool) -> None:
    side, old, new = Side(), memory(), memory()
    side.meet(old, epoch=1)
    side.transport.still.add("epoch 1")
    side.send(1, epoch=1, layers=range(MODEL.num_layers))
    if forgets:
        side.forget(epoch=1)
    side.meet(new, epoch=1, waits=False)
    side.forget(epoch=1)
    side.assert_silent()
    side.transport.still.clear()
    assert side.report().request_id == 1
    for _ in range(2 + forgets):
        side.assert_answered()
    side.thread.close()
    assert not side.errors and not side.transport.peers


def test_a_target_known_to_be_dead_is_forgotten_at_once_and_its_hand_offs_end() -> None:
    side, target = Side(), memory()
    side.meet(target, epoch=1)
    side.transport.still.add("epoch 1")
    side.send(1, epoch=1, layers=range(MODEL.num_layers))
    side.forget(epoch=1)
    side.assert_silent()
    side.forget(epoch=1, is_dead=True)
    assert "dead" in side.failure().reason
    assert not side.report().may_land
    side.assert_answered()
    side.assert_answered()
    side.thread.close()
    assert not side.errors and not side.transport.peers


def test_a_write_that_does_not_end_in_time_ends_its_hand_off_and_is_reported_when_it_has_ended() -> None:
    side, target = Side(write_timeout_s=0.05), memory()
    side.meet(target, epoch=1)
    side.transport.still.add("epoch 1")
    side.send(1, epoch=1, layers=range(MODEL.num_layers))
    assert "within 0.05 s" in side.failure().reason
    side.assert_silent()  # the pages of both sides are still in use
    side.transport.still.clear()
    assert side.report().request_id == 1
    side.thread.close()
    assert not side.errors


@pytest.mark.parametrize(
    ("break_it", "may_land", "reason"),
    [
        (lambda transport: transport.refusing, False, "has not begun"),
        (lambda transport: transport.broken, True, "broke off"),
    ],
)
def test_a_write_that_fails_ends_its_own_hand_off_and_the_next_one_connects_anew(
    break_it: Callable[[InProcessTransport], set[str]], may_land: bool, reason: str
) -> None:
    side, targets = Side(), [memory(), memory()]
    for epoch, target in enumerate(targets, 1):
        side.meet(target, epoch=epoch)
    break_it(side.transport).add("epoch 1")
    side.send(1, epoch=1, layers=range(1))
    side.send(2, epoch=2, layers=range(MODEL.num_layers))
    assert reason in side.failure().reason
    assert side.report().request_id == 2
    side.send(1, epoch=1, layers=range(1, MODEL.num_layers))
    done = side.report()
    assert (done.request_id, done.may_land) == (1, may_land)
    assert np.array_equal(targets[1][:, [3, 2]], side.kv[:, [0, 1]])
    break_it(side.transport).clear()
    before = side.transport.num_connects
    side.send(3, epoch=1, layers=range(MODEL.num_layers))
    assert side.report().bytes == 2 * side.kv[:, 0].nbytes
    assert side.transport.num_connects == before + 1
    side.thread.close()
    assert np.array_equal(targets[0][:, [3, 2]], side.kv[:, [0, 1]])
    assert not side.errors and sorted(side.transport.peers) == ["epoch 1", "epoch 2"]


def test_a_target_that_stands_still_does_not_keep_a_rank_from_closing() -> None:
    side, target = Side(), memory()
    side.meet(target, epoch=1)
    side.transport.still.add("epoch 1")
    side.send(1, epoch=1, layers=range(MODEL.num_layers))
    side.thread.close()
    assert side.transport.is_closed and not side.errors


def test_a_target_that_was_never_introduced_ends_that_hand_off() -> None:
    side = Side()
    side.meet(memory(), epoch=1)
    side.send(1, epoch=2, layers=range(MODEL.num_layers))
    assert "not there" in side.failure().reason
    assert side.report().bytes == 0
    side.thread.close()
    assert not side.errors


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda group: setattr(group.planes[1], "dtype", "float16"), "plane v of group full has dtype float32 here"),
        (lambda group: setattr(group, "name", "other"), "the cache groups full here and other there"),
        (lambda group: setattr(group, "page_size", 0), "pages of 0 tokens there"),
        (lambda group: group.layers.remove(1), "no layer 1 there"),
        (lambda group: setattr(group, "first_head", 99), "has the heads 99 to"),
    ],
)
def test_a_target_that_stores_something_else_is_refused_and_the_rank_goes_on(
    break_it: Callable[[control_pb2.GroupMemory], object], said: str
) -> None:
    (group,) = storage_to_wire(STORAGE)
    break_it(group)
    refused(endpoints=[control_pb2.Endpoint(groups=[group]).SerializeToString()], said=said)


def test_endpoints_that_are_none_or_not_one_for_each_rank_are_refused() -> None:
    refused(endpoints=[b"\xff\xff"], said="an endpoint of the target is no message")
    refused(endpoints=[], said="the target has 1 ranks, but 0 endpoints came")
    refused(endpoints=[b""], said="the cache groups full here and none there")


def refused(*, endpoints: list[bytes], said: str) -> None:
    """A target with these endpoints is refused by a sentence, and the next one is written to."""
    side, target = Side(), memory()
    connect = control_pb2.ConnectTarget(sizes=sizes_to_wire(SHAPE), endpoints=endpoints)
    side.order(control_pb2.PeerOrder(replica="decode/1", epoch=1, connect_target=connect))
    answer = side.reports.get(timeout=10).peer_answer
    assert answer.order_id == side.unanswered.pop(0) and said in answer.refusal
    side.num_answered += 1
    side.meet(target, epoch=2)
    side.send(7, epoch=2, layers=range(MODEL.num_layers))
    assert side.report().bytes == 2 * side.kv[:, 0].nbytes
    side.thread.close()
    assert not side.errors
