"""Reserved rendezvous ports: one listening socket a device, kept open for the launcher's life.

A port is listened on before it is announced, so nothing can take it; the rank on the device inherits the socket.
"""

import socket


class RendezvousPorts:
    """The listening socket of each device, made when it is first asked for."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._sockets: dict[int, socket.socket] = {}

    @property
    def num_devices(self) -> int:
        """How many devices have been asked for."""
        return len(self._sockets)

    def socket(self, device: int) -> socket.socket:
        """The device's listening socket."""
        if device not in self._sockets:
            listening = socket.socket(socket.AF_INET6 if ":" in self._address else socket.AF_INET)
            listening.bind((self._address, 0))
            listening.listen(1024)
            self._sockets[device] = listening
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
