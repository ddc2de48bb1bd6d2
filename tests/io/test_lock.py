from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm2vec import io
from vlm2vec.errors import EnvError, RunLockedError
from vlm2vec.io.lock import LOCK

HOST = socket.gethostname()


def take(directory: Path) -> None:
    with io.run_lock(directory):
        pass


def refused(directory: Path) -> None:
    with pytest.raises(RunLockedError):
        take(directory)


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # a grandchild is not ours to wait for
        os.waitpid(pid, 0)


@contextlib.contextmanager
def holder(directory: Path) -> Iterator[int]:
    """The pid of a living process that holds the lock and has forked a worker since, as a loader does; the worker outlives it."""
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        with io.run_lock(directory):
            if worker := os.fork():
                os.write(said, worker.to_bytes(8, "big"))
            signal.pause()
    worker = int.from_bytes(os.read(ready, 8), "big")
    try:
        yield pid
        os.kill(worker, 0)
    finally:
        end(pid)
        end(worker)
        os.close(ready)
        os.close(said)


def write_holder(directory: Path, pid: int, host: str = HOST) -> None:
    (directory / LOCK).write_text(json.dumps({"pid": pid, "host": host, "since": "2026-01-01 14:02:00"}))


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that gives no locks."""

    def lockf(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_living_holder_is_named_and_its_death_frees_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(tmp_path / "run") as pid:
        with pytest.raises(RunLockedError, match=rf"held by pid {pid} on host {HOST} since \d{{4}}-.* \(alive\)") as caught:
            take(tmp_path / "run")
        assert caught.value.exit_code == 5
        end(pid)
        with caplog.at_level(logging.WARNING):
            take(tmp_path / "run")
        assert f"taking over from pid {pid} on host {HOST}" in caplog.text


def test_released_on_exit_and_on_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), io.run_lock(tmp_path):
        raise KeyError
    for _ in range(3):
        take(tmp_path)
    assert (tmp_path / LOCK).read_bytes() == b""
    assert caplog.text == ""


def test_same_process_cannot_hold_it_twice_nor_can_its_child(tmp_path: Path, forked: Callable[..., int]) -> None:
    with io.run_lock(tmp_path):
        for alias in (tmp_path, tmp_path / "." / "x" / ".."):
            with pytest.raises(RunLockedError, match="held by this process"):
                take(alias)
        assert forked(refused, tmp_path) == 0
        assert forked(refused, tmp_path) == 0  # the failed attempts released nothing
    assert forked(take, tmp_path) == 0


def test_child_takes_what_its_parent_released(tmp_path: Path) -> None:
    ready, released = os.pipe()
    with io.run_lock(tmp_path):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.read(ready, 1)
                take(tmp_path)
                code = 0
            finally:
                os._exit(code)
    os.write(released, b"x")
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b'{"pid": "1", "host": "h", "since": "t"}'])
def test_unreadable_lock_file_blocks_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    take(tmp_path)


def test_kernel_knows_better_than_the_file(tmp_path: Path) -> None:
    write_holder(tmp_path, os.getppid())  # a pid that was given to somebody else since
    take(tmp_path)
    write_holder(tmp_path, 1, "a-host-that-was-preempted")
    take(tmp_path)


@pytest.mark.usefixtures("no_locks")
class TestWithoutLocks:
    def test_dead_holder_is_taken_over(self, tmp_path: Path) -> None:
        write_holder(tmp_path, dead_pid())
        take(tmp_path)
        take(tmp_path)

    def test_living_holder_is_believed(self, tmp_path: Path) -> None:
        write_holder(tmp_path, os.getppid())
        with pytest.raises(RunLockedError, match=rf"pid {os.getppid()} .*\(alive\).*delete .*{LOCK}"):
            take(tmp_path)

    def test_other_host_is_believed(self, tmp_path: Path) -> None:
        write_holder(tmp_path, dead_pid(), "elsewhere")
        with pytest.raises(RunLockedError, match="on host elsewhere since 2026-01-01 14:02:00 .*cannot be asked"):
            take(tmp_path)

    def test_child_sees_the_holder(self, tmp_path: Path, forked: Callable[..., int]) -> None:
        with io.run_lock(tmp_path):
            assert forked(refused, tmp_path) == 0


def test_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="cannot write"):
        take(tmp_path / "file")
