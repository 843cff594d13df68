"""Faults between hosts, and between the hosts and the address that the router listens on."""

from collections.abc import Iterator, Sequence

from parallel.process.address import parse_address
from router.config import LOCAL, Config, HostConfig
from router.config_source import ConfigSource
from router.problem import KeyPath, Problem


def check_hosts(config: Config, *, source: ConfigSource) -> Iterator[Problem]:
    """One problem for each host that cannot be told from an earlier one or shares with it what only one can have."""
    yield from _same_name(config.hosts, source=source)
    yield from _same_address(config.hosts, source=source)
    yield from _same_devices(config.hosts, source=source)
    yield from _on_the_routers_port(config, source=source)


def _same_name(hosts: Sequence[HostConfig], *, source: ConfigSource) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, host in enumerate(hosts):
        first = seen.setdefault(host.label, index)
        if first != index:
            path: KeyPath = ("hosts", index, "name" if host.name else "address")
            line = source.line(("hosts", first))
            remedy = "give each host its own name"
            yield source.problem(path, what=f"the host on line {line} has this name too", remedy=remedy)


def _same_address(hosts: Sequence[HostConfig], *, source: ConfigSource) -> Iterator[Problem]:
    seen: dict[object, int] = {}
    for index, host in enumerate(hosts):
        if host.address == LOCAL:
            continue
        first = seen.setdefault(parse_address(host.address).socket, index)
        if first != index:
            line = source.line(("hosts", first, "address"))
            yield source.problem(
                ("hosts", index, "address"),
                what=f"the host {hosts[first].label} on line {line} has this address too",
                remedy="a launcher has a port of its own: write this one's",
            )


def _same_devices(hosts: Sequence[HostConfig], *, source: ConfigSource) -> Iterator[Problem]:
    """Two local launchers see the same accelerators; on a cpu a device is only a number."""
    seen: dict[int, int] = {}
    for index, host in enumerate(hosts):
        if host.address != LOCAL or host.device == "cpu":
            continue
        shared: dict[int, list[int]] = {}
        for device in sorted(host.device_indices):
            first = seen.setdefault(device, index)
            if first != index:
                shared.setdefault(first, []).append(device)
        for first, devices in shared.items():
            yield source.problem(
                ("hosts", index, "devices"),
                what=f"the host {hosts[first].label} has device {', '.join(map(str, devices))} of this machine too",
                remedy="list other device indices",
            )


def _on_the_routers_port(config: Config, *, source: ConfigSource) -> Iterator[Problem]:
    listen = parse_address(config.listen)
    for index, host in enumerate(config.hosts):
        if host.address != LOCAL and listen.collides(parse_address(host.address)):
            line = source.line(("listen",))
            yield source.problem(
                ("hosts", index, "address"),
                what=f"the router itself listens on this port (listen = {config.listen}, line {line})",
                remedy="write the launcher's own port, or let the router listen on another",
            )
