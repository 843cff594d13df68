"""Protobuf messages over a stream socket: four bytes of length, little-endian, then the message."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")


class FrameSocket:
    """Sends from any thread, receives in one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, payload: bytes) -> None:
        """Blocking; OSError where the other end is gone."""
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive(self, *, most_bytes: int | None = None) -> bytes | None:
        """Blocking: the next message; None at the end of the stream, or where one is longer than `most_bytes`."""
        header = self._read(_LENGTH.size)
        if header is None:
            return None
        (size,) = _LENGTH.unpack(header)
        return None if most_bytes is not None and size > most_bytes else self._read(size)

    def __iter__(self) -> Iterator[bytes]:
        while (payload := self.receive()) is not None:
            yield payload

    def close(self) -> None:
        """Ends both directions, so that a thread blocked in `receive` wakes; idempotent."""
        with contextlib.suppress(OSError):  # the other end closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(size - len(parts))
            except OSError:
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)
