"""Reserved rendezvous ports: one listening socket a device, kept open for the launcher's life.

A port is listened on before it is announced, so nothing can take it; the rank on the device inherits the socket.
"""

import socket

from parallel.process.address import Address
from parallel.process.listening import listen


class RendezvousPorts:
    """The listening socket of each device, made when it is first asked for."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._sockets: dict[int, socket.socket] = {}

    def socket(self, device: int) -> socket.socket:
        """The device's listening socket."""
        if device not in self._sockets:
            self._sockets[device] = listen(Address(host=self._host, port=0), backlog=1024)
        return self._sockets[device]

    def port(self, device: int) -> int:
        """The port that is reserved for `device`."""
        number: int = self.socket(device).getsockname()[1]
        return number

    def close(self) -> None:
        """Gives all ports back; idempotent."""
        for listening in self._sockets.values():
            listening.close()
        self._sockets = {}
