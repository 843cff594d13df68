"""Network addresses as people and gRPC write them: `host:port`, with an IPv6 host in brackets.

The one place that takes them apart and puts them together. torch, NCCL and sockets take the bare host and the port.
"""

from dataclasses import dataclass
from ipaddress import ip_address

_EXAMPLE = "write host:port, for example 127.0.0.1:30000"


@dataclass(frozen=True, kw_only=True)
class Address:
    """A host and a port; `host` has no brackets, is in lower case, and an IP address in its shortest form."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_any(self) -> bool:
        """Whether a server here listens on every interface."""
        return self.host in ("0.0.0.0", "::")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def socket(self) -> tuple[str, int]:
        """Equal for two addresses that each name one interface, where two servers there would want one port."""
        return ("loopback" if self.is_loopback else self.host, self.port)

    def collides(self, other: "Address") -> bool:
        """Whether two servers, here and at `other`, would want one port of one machine."""
        if self.port != other.port or self.port == 0:
            return False
        return (
            self.host == other.host
            or (self.is_loopback and other.is_loopback)
            or (self.is_any and (other.is_loopback or other.is_any))
            or (other.is_any and self.is_loopback)
        )


def parse_address(text: str) -> Address:
    """The address that `text` names; ValueError with the remedy where it is none. Port 0 stands for any free one."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        example = f"{_EXAMPLE} or, for IPv6, [::1]:30000" if text.count(":") > 1 else _EXAMPLE
        raise ValueError(f"has no port; {example}")
    if not (port.isascii() and port.isdigit()):
        raise ValueError(f"has port {port!r}, which is no number; {_EXAMPLE}")
    # The length is looked at first: a number of thousands of digits is slow to read, or refused by int().
    if len(port) > 5 or int(port) > 65535:
        raise ValueError("has a port out of range; write a port from 1 to 65535")
    return Address(host=_host(host), port=int(port))


def _host(host: str) -> str:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or any(character.isspace() or character in "[]/@" for character in bare):
        raise ValueError(f"has host {host!r}; {_EXAMPLE}")
    try:
        return str(ip_address(bare))
    except ValueError:
        if ":" in bare:
            raise ValueError(f"has host {host!r}, which is no IPv6 address; {_EXAMPLE} or [::1]:30000") from None
        return bare.lower()
