"""Sockets at addresses that are free, taken or none, and how an address is told."""

from __future__ import annotations

import socket

import pytest

from vlm2vec.address import bound, listen, url
from vlm2vec.errors import EnvError, InputError


@pytest.mark.parametrize("port", [-1, 65_536, 10**30])
def test_a_number_that_is_no_port(port: int) -> None:
    with pytest.raises(InputError, match=f"--port {port}: expected 0 to 65,535"):
        bound("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "a" * 64, "a\0b", ""])
def test_a_name_that_is_no_host(host: str) -> None:
    with pytest.raises(EnvError, match="cannot serve at .* port 0: .*; choose another --port or --host"):
        bound(host, 0)


def test_it_is_bound_and_listens_when_it_is_told() -> None:
    with bound("localhost", 0) as sock, socket.socket() as caller:
        address = sock.getsockname()
        assert caller.connect_ex(address) != 0
        listen(sock)
        assert caller.connect_ex(address) == 0


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvError, match=f"cannot serve at 127.0.0.1 port {port}: Address already in use"):
            bound("127.0.0.1", port)


def test_of_two_that_are_bound_one_listens() -> None:
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bound("127.0.0.1", port) as second:
            listen(first)
            with pytest.raises(EnvError, match=f"127.0.0.1 port {port}: Address already in use"):
                listen(second)


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("fe80::1", "[fe80::1]"), ("box", "box"), ("127.0.0.1", "127.0.0.1")]
)
def test_the_address_that_is_told_can_be_opened(host: str, shown: str) -> None:
    assert url(host, 7) == f"http://{shown}:7"
