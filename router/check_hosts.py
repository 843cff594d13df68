"""Faults between hosts, and between the hosts and the address that the router listens on."""

from collections.abc import Iterator
from itertools import combinations

from router.address import parse_address
from router.config import LOCAL, Config, HostConfig
from router.config_source import ConfigSource
from router.problem import KeyPath, Problem

Numbered = tuple[int, HostConfig]


def check_hosts(config: Config, *, source: ConfigSource) -> Iterator[Problem]:
    """One problem for each pair of hosts that cannot be told apart or share what only one can have."""
    for first, second in combinations(enumerate(config.hosts), 2):
        yield from _same_name(first, second, source=source)
        yield from _same_address(first, second, source=source)
        yield from _same_devices(first, second, source=source)
    yield from _on_the_routers_port(config, source=source)


def _same_name(first: Numbered, second: Numbered, *, source: ConfigSource) -> Iterator[Problem]:
    if first[1].label != second[1].label:
        return
    path: KeyPath = ("hosts", second[0], "name" if second[1].name else "address")
    line = source.line(("hosts", first[0]))
    yield source.problem(path, what=f"the host on line {line} has this name too", remedy="give each host its own name")


def _same_address(first: Numbered, second: Numbered, *, source: ConfigSource) -> Iterator[Problem]:
    if LOCAL in (first[1].address, second[1].address):
        return
    if parse_address(first[1].address).collides(parse_address(second[1].address)):
        line = source.line(("hosts", first[0], "address"))
        yield source.problem(
            ("hosts", second[0], "address"),
            what=f"the host {first[1].label} on line {line} has this address too",
            remedy="a launcher has a port of its own: write this one's",
        )


def _same_devices(first: Numbered, second: Numbered, *, source: ConfigSource) -> Iterator[Problem]:
    """Two local launchers see the same accelerators; on a cpu a device is only a number."""
    if any(host.address != LOCAL or host.device == "cpu" for host in (first[1], second[1])):
        return
    shared = sorted(set(first[1].device_indices) & set(second[1].device_indices))
    if shared:
        yield source.problem(
            ("hosts", second[0], "devices"),
            what=f"the host {first[1].label} has device {', '.join(map(str, shared))} of this machine too",
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
