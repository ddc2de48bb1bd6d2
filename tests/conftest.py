"""What every test gets: no network but loopback, and a way to run a piece of a test in a process of its own."""

from __future__ import annotations

import os
import secrets
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest


def _is_local(address: object) -> bool:
    """Unix sockets are addressed by a path, the others by (host, port, ...)."""
    host = address[0] if isinstance(address, tuple) else None
    return host is None or host in ("localhost", "::1", "", None) or str(host).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def only_loopback() -> Iterator[None]:
    """Refuse every connection and every name lookup that would leave this machine."""
    patch = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: object, original: Callable = original) -> object:
            if not _is_local(address):
                raise OSError(f"tests have no network: {address!r}")
            return original(self, address)

        patch.setattr(socket.socket, name, guarded)
    lookup = socket.getaddrinfo

    def guarded_lookup(host: object, *args: object, **options: object) -> object:
        if not _is_local((host,)):
            raise socket.gaierror(f"tests have no network: {host!r}")
        return lookup(host, *args, **options)  # type: ignore[arg-type]

    patch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    patch.undo()


def start(function: Callable[..., object], *args: object) -> int:
    """Run a function in a forked child; returns its process id. It exits with 0 if the function returned and with 70 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of a child, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def forked() -> Callable[..., int]:
    """Run a function in a forked child to its end; gives its exit code."""
    return lambda function, *args: ended(start(function, *args))


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a function of the rank as `world` forked processes of one gloo group; fails unless all return."""
    import torch  # here, so that the children need not

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def member(function: Callable[[int], object], rank: int, world: int, store: Path) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", f"file://{store}", timedelta(seconds=20), rank=rank, world_size=world)
        function(rank)

    def run(function: Callable[[int], object], world: int = 2) -> None:
        store = tmp_path / f"store-{secrets.token_hex(4)}"
        children = [start(member, function, rank, world, store) for rank in range(world)]
        assert [ended(pid) for pid in children] == [0] * world

    return run
