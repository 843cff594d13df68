"""Listening on this machine: sockets for any kind of address, and in words why an address cannot be listened on."""

import errno
import socket
from dataclasses import replace

import grpc

from parallel.process.address import Address

_WHY = {
    errno.EADDRINUSE: "something listens there already; stop it, or take another port",
    errno.EADDRNOTAVAIL: "this machine has no such address; take one of its own, or 127.0.0.1",
    errno.EACCES: "this user may not listen there; take a port above 1023",
}


class ListenError(ValueError):
    """An address that cannot be listened on; the text says why, and what to do."""


def listen(address: Address, *, backlog: int) -> socket.socket:
    """A listening socket at `address`, IPv4 or IPv6, by number or by name; OSError where there can be none."""
    failure: OSError | None = None
    for family, _, _, _, place in socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            return _listening(family, place, backlog=backlog)
        except OSError as error:
            failure = failure or error
    raise failure or OSError(errno.EADDRNOTAVAIL, f"{address.host} has no address")


def loopback_host() -> str:
    """The loopback address of this machine: that of IPv4, where it has one."""
    try:
        listen(Address(host="127.0.0.1", port=0), backlog=1).close()
    except OSError:
        return "::1"
    return "127.0.0.1"


def add_port(server: grpc.aio.Server, address: Address) -> Address:
    """Has `server` listen at `address` and returns where it does; ListenError where it cannot.

    Tried with a socket of our own first: gRPC does not say why, and complains on standard error by itself.
    """
    ensure_free(address)
    try:
        return replace(address, port=server.add_insecure_port(str(address)))
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: {error}") from None


def ensure_free(address: Address) -> None:
    """ListenError, which says why, where this process could not listen at `address`."""
    try:
        listen(address, backlog=1).close()
    except socket.gaierror as error:
        raise ListenError(f"cannot listen on {address}: the host is not known here ({error.strerror})") from None
    except OSError as error:
        why = _WHY.get(error.errno or 0, str(error.strerror))
        raise ListenError(f"cannot listen on {address}: {why}") from None


def _listening(family: int, place: object, *, backlog: int) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        # What ended a moment ago leaves connections behind, which must not keep a port.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind(place)  # type: ignore[arg-type]  # as getaddrinfo gives it
        connection.listen(backlog)
    except OSError:
        connection.close()
        raise
    return connection
