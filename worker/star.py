"""The control star: each rank of a replica has one two-way connection with the leader, apart from the collectives.

The leader listens on a port of the system's choice and publishes it in the replica's store. A member introduces itself
with the assignment's epoch and secret, so that a rank of another epoch, or a stranger, cannot join.
"""

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from parallel.communicator import PeerLostError
from proto import step_pb2
from worker.frames import FrameSocket

logger = logging.getLogger(__name__)

_KEY = "star"


class LeaderStar:
    """The leader's side: a connection to each other rank, and a shortcut to its own."""

    def __init__(
        self,
        *,
        store: Any,
        address: str,
        join: step_pb2.Join,
        world_size: int,
        timeout_s: float,
        deliver: Callable[[step_pb2.FromMember], None],
        deliver_own: Callable[[step_pb2.ToMember], None],
    ) -> None:
        self._deliver = deliver
        self._deliver_own = deliver_own
        self._members: dict[int, FrameSocket] = {}
        with socket.create_server((address, 0)) as server:
            server.settimeout(timeout_s)
            store.set(_KEY, f"{address}:{server.getsockname()[1]}")
            while len(self._members) < world_size - 1:
                self._accept(server, join)

    def broadcast(self, message: step_pb2.ToMember) -> None:
        """Sends to every rank, its own last, so that the others are not behind it."""
        payload = message.SerializeToString()
        for rank, member in self._members.items():
            _send(member, payload, to=f"rank {rank}")
        self._deliver_own(message)

    def send(self, message: step_pb2.FromMember) -> None:
        """What the leader's own rank answers."""
        self._deliver(message)

    def close(self) -> None:
        """Ends all connections; idempotent."""
        for member in self._members.values():
            member.close()

    def _accept(self, server: socket.socket, expected: step_pb2.Join) -> None:
        connection, peer = server.accept()
        connection.settimeout(10)
        frames = FrameSocket(connection)
        payload = frames.receive() or b""
        join = step_pb2.FromMember.FromString(payload).join
        if (join.epoch, join.secret) != (expected.epoch, expected.secret):
            logger.warning("refused a stranger at the control star: address=%s epoch=%d", peer, join.epoch)
            frames.close()
            return
        connection.settimeout(None)
        self._members[join.global_rank] = frames
        threading.Thread(target=self._read, args=(frames,), name=f"star-{join.global_rank}", daemon=True).start()

    def _read(self, frames: FrameSocket) -> None:
        for payload in frames:
            self._deliver(step_pb2.FromMember.FromString(payload))


class MemberStar:
    """Any other rank's side."""

    def __init__(
        self, *, store: Any, join: step_pb2.Join, timeout_s: float, deliver: Callable[[step_pb2.ToMember], None]
    ) -> None:
        address, port = store.get(_KEY).decode().rsplit(":", 1)
        connection = socket.create_connection((address, int(port)), timeout=timeout_s)
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
