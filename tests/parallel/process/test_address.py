"""Addresses as people write them: taken apart and put together in one place, IPv6 in brackets."""

import pytest

from parallel.process.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("Far.Example:80", "far.example", 80),
        ("[::1]:30000", "::1", 30000),
        ("[0:0:0:0:0:0:0:1]:30000", "::1", 30000),
        ("[2001:DB8::1]:1", "2001:db8::1", 1),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("[::]:65535", "::", 65535),
    ],
)
def test_an_address_is_a_bare_host_and_a_port_and_joins_to_itself(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host=host, port=port)
    assert parse_address(str(address)) == address
    assert ("[" in str(address)) is (":" in host)


@pytest.mark.parametrize(
    ("first", "second", "collide"),
    [
        ("a:1", "A:1", True),
        ("a:1", "a:2", False),
        ("a:1", "b:1", False),
        ("localhost:1", "127.0.0.1:1", True),
        ("[::1]:1", "127.0.0.1:1", True),
        ("0.0.0.0:1", "localhost:1", True),
        ("0.0.0.0:1", "10.0.0.1:1", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
    ],
)
def test_addresses_collide_where_one_machine_would_give_a_port_twice(first: str, second: str, collide: bool) -> None:
    assert parse_address(first).collides(parse_address(second)) is collide
    assert parse_address(second).collides(parse_address(first)) is collide


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        ":1",
        "a:",
        "a:b",
        "a:1b",
        "a:70000",
        "a:-1",
        "::1",
        "::1:1",
        "[::1]",
        "[::1:1",
        "[x:y]:1",
        "a b:1",
        "http://a:1",
    ],
)
def test_what_is_no_address_is_an_error_with_a_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=r"; write (host:port, for example|a port from 1 to 65535)"):
        parse_address(text)
