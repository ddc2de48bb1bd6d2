from __future__ import annotations

import errno
import signal
from collections.abc import Callable

import pytest

from vlm2vec.io import fault


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM2VEC_FAULT", raising=False)
    fault("after-write", "x")


def test_every_nth_call_of_the_point_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_FAULT", "after-rename:3:enospc")
    failed = []
    for call in range(1, 8):
        fault("before-rename")
        try:
            fault("after-rename", "file")
        except OSError as error:
            assert (error.errno, error.filename) == (errno.ENOSPC, "file")
            failed.append(call)
    assert failed == [3, 6]


def test_star_is_any_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_FAULT", "*:2:eacces")
    fault("one")
    with pytest.raises(PermissionError):
        fault("two")


def test_kill(monkeypatch: pytest.MonkeyPatch, forked: Callable[..., int]) -> None:
    monkeypatch.setenv("VLM2VEC_FAULT", "here:1:kill")
    assert forked(fault, "elsewhere") == 0
    assert forked(fault, "here") == -signal.SIGKILL
