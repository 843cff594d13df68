"""The control star: each rank of a replica has one two-way connection with the leader, apart from the collectives.

The leader listens on a port of the system's choice and publishes it in the replica's store. A member introduces itself
with the assignment's epoch and secret, so that a rank of another epoch, or a stranger, cannot join.
"""

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from parallel.collectives.communicator import PeerLostError
from parallel.process.address import Address, parse_address
from parallel.process.listening import listen
from proto import step_pb2
from worker.frames import FrameSocket

logger = logging.getLogger(__name__)

_KEY = "star"
#: A rank introduces itself at once, in few bytes.
_JOIN_S, _JOIN_BYTES = 10.0, 1024


class LeaderStar:
    """The leader's side: a connection to each other rank, and a shortcut to its own."""

    def __init__(
        self,
        *,
        store: Any,
        address: str,
        join: step_pb2.Join,
        dp_ranks: Sequence[int],
        timeout_s: float,
        deliver: Callable[[step_pb2.FromMember], None],
        deliver_own: Callable[[step_pb2.ToMember], None],
    ) -> None:
        """Blocks until every rank has joined. `dp_ranks`: the dp coordinate of each rank of the replica."""
        self._dp_ranks = dp_ranks
        self._deliver = deliver
        self._deliver_own = deliver_own
        self._members: dict[int, FrameSocket] = {}
        joined: queue.SimpleQueue[tuple[int, FrameSocket]] = queue.SimpleQueue()
        with listen(Address(host=address, port=0), backlog=len(dp_ranks)) as server:
            threading.Thread(target=_accept, args=(server, join, joined), name="star", daemon=True).start()
            store.set(_KEY, str(Address(host=address, port=server.getsockname()[1])))
            try:
                self._wait_for_all(joined, world_size=len(dp_ranks), timeout_s=timeout_s)
            finally:
                server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts

    def broadcast(self, message: step_pb2.ToMember) -> None:
        """Sends the same to every rank, its own last, so that the others are not behind it."""
        payload = message.SerializeToString()
        for rank, member in self._members.items():
            _send(member, payload, to=f"rank {rank}")
        self._deliver_own(message)

    def send_plans(self, plans: Sequence[step_pb2.StepPlan]) -> None:
        """Sends to every rank the plan of its own dp coordinate, one of `plans`; its own last."""
        messages = [step_pb2.ToMember(plan=plan) for plan in plans]
        payloads = [message.SerializeToString() for message in messages]
        for rank, member in self._members.items():
            _send(member, payloads[self._dp_ranks[rank]], to=f"rank {rank}")
        self._deliver_own(messages[self._dp_ranks[0]])

    def send(self, message: step_pb2.FromMember) -> None:
        """What the leader's own rank answers."""
        self._deliver(message)

    def close(self) -> None:
        """Ends all connections; idempotent."""
        for member in self._members.values():
            member.close()

    def _wait_for_all(
        self, joined: "queue.SimpleQueue[tuple[int, FrameSocket]]", *, world_size: int, timeout_s: float
    ) -> None:
        deadline = time.monotonic() + timeout_s
        missing = set(range(1, world_size))
        while missing:
            try:
                rank, frames = joined.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                listed = ", ".join(map(str, sorted(missing)))
                raise TimeoutError(f"ranks {listed} did not join the control star within {timeout_s:g} s") from None
            if rank not in missing:
                logger.warning("refused a rank that is not waited for at the control star: rank=%d", rank)
                frames.close()
                continue
            missing.remove(rank)
            self._members[rank] = frames
            threading.Thread(target=self._read, args=(frames,), name=f"star-{rank}", daemon=True).start()

    def _read(self, frames: FrameSocket) -> None:
        for payload in frames:
            self._deliver(step_pb2.FromMember.FromString(payload))


def _accept(server: socket.socket, expected: step_pb2.Join, joined: Any) -> None:
    """Greets whoever connects, each in a thread of its own: one that says nothing keeps no other waiting."""
    while True:
        try:
            connection, peer = server.accept()
        except OSError:
            return  # all ranks are here
        threading.Thread(
            target=_greet, args=(connection, peer, expected, joined), name="star-join", daemon=True
        ).start()


def _greet(connection: socket.socket, peer: Any, expected: step_pb2.Join, joined: Any) -> None:
    """Hands on a rank that knows the epoch and the secret; anybody else is a stranger."""
    connection.settimeout(_JOIN_S)
    frames = FrameSocket(connection)
    try:
        join = step_pb2.FromMember.FromString(frames.receive(most_bytes=_JOIN_BYTES) or b"").join
    except DecodeError:
        join = step_pb2.Join()
    if (join.epoch, join.secret) != (expected.epoch, expected.secret):
        logger.warning("refused a stranger at the control star: address=%s epoch=%d", peer, join.epoch)
        frames.close()
        return
    connection.settimeout(None)
    joined.put((join.global_rank, frames))


class MemberStar:
    """Any other rank's side."""

    def __init__(
        self, *, store: Any, join: step_pb2.Join, timeout_s: float, deliver: Callable[[step_pb2.ToMember], None]
    ) -> None:
        leader = parse_address(store.get(_KEY).decode())
        connection = socket.create_connection((leader.host, leader.port), timeout=timeout_s)
        connection.settimeout(None)
        self._frames = FrameSocket(connection)
        self._deliver = deliver
        self._frames.send(step_pb2.FromMember(join=join).SerializeToString())
        threading.Thread(target=self._read, name="star", daemon=True).start()

    def send(self, message: step_pb2.FromMember) -> None:
        """Sends to the leader."""
        _send(self._frames, message.SerializeToString(), to="the leader")

    def close(self) -> None:
        """Ends the connection; idempotent."""
        self._frames.close()

    def _read(self) -> None:
        for payload in self._frames:
            self._deliver(step_pb2.ToMember.FromString(payload))


def _send(frames: FrameSocket, payload: bytes, *, to: str) -> None:
    """PeerLostError where the other end is gone: its own end is the cause, not this rank's."""
    try:
        frames.send(payload)
    except OSError as error:
        raise PeerLostError(f"the control connection to {to} is gone: {error}") from error
