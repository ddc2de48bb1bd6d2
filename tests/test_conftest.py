from __future__ import annotations

import os
import signal
import socket
import urllib.request
from collections.abc import Callable

import pytest


@pytest.mark.parametrize("address", [("93.184.216.34", 80), ("2606:2800:220::1", 80, 0, 0)])
def test_no_connection_leaves_the_machine(address: tuple) -> None:
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with socket.socket(family) as open_socket, pytest.raises(OSError, match="tests have no network"):
        open_socket.connect(address)


def test_no_name_is_looked_up() -> None:
    with pytest.raises(OSError, match="tests have no network"):
        urllib.request.urlopen("https://example.org", timeout=5)


def test_loopback_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port), timeout=5) as client:
            assert client.getpeername()[1] == port


def test_forked_reports_how_the_child_ended(forked: Callable[..., int]) -> None:
    assert forked(lambda: None) == 0
    assert forked(lambda: 1 / 0) == 70
    assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
