"""Where a server is to be found: a socket at a host and a port, and the address that clients are told."""

from __future__ import annotations

import socket

from vlm2vec.errors import EnvError, InputError

BACKLOG = 2048  # connections that wait to be accepted
LAST = 65_535
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where to listen -> where a client on this machine finds it


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet. Raises InputError for no port, EnvError where the address is not to be had."""
    if not 0 <= port <= LAST:
        raise InputError(f"--port {port}: expected 0 to {LAST:,}; 0 takes a free one")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return _bound(socket.socket(family, socket.SOCK_STREAM), host, port)
    except (OSError, ValueError) as error:  # ValueError: what no name can be, as "a..b"
        raise _refused(host, port, error) from None


def _bound(sock: socket.socket, host: str, port: int) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also while connections of a server before it linger
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def listen(sock: socket.socket) -> None:
    """Let connections come, which wait until they are accepted. Raises EnvError where another process was faster.

    Two sockets may be bound to one port as long as neither listens.
    """
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _refused(host, port, error) from None


def _refused(host: str, port: int, error: Exception) -> EnvError:
    reason = getattr(error, "strerror", None) or error
    return EnvError(f"cannot serve at {host} port {port}: {reason}; choose another --port or --host")


def url(host: str, port: int) -> str:
    """The address for a client on this machine."""
    shown = EVERYWHERE.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
