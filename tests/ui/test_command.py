"""`vlm2vec ui` as a user starts it: what it says, what stops it, and the page in a real browser where there is one."""

from __future__ import annotations

import builtins
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.corpora import paint
from vlm2vec.cli import main, parse
from vlm2vec.commands import ui

MODEL = "builtin/tiny-qwen2_vl"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    for name, colour in {"red.png": (220, 20, 20), "green.png": (20, 220, 20)}.items():
        paint(folder / "pictures" / name, colour)
    assert main(["index", str(folder / "pictures"), "--model", MODEL, "--to", str(folder / "index"), "--device", "cpu"]) == 0
    return folder / "index"


@contextmanager
def served(index: Path) -> Iterator[str]:
    """The address of the command in a process of its own, which Ctrl-C ends with code 0 and no traceback."""
    words = [sys.executable, "-m", "vlm2vec", "ui", str(index), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"2 items at (http://127\.0\.0\.1:\d+) .*\n", said)
        assert found, said
        yield found[1]
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in error, error
    finally:
        process.kill()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_it_serves_until_it_is_interrupted(index: Path) -> None:
    with served(index) as address:
        with urllib.request.urlopen(f"{address}/?text=red&top=1", timeout=30) as answer:
            text = answer.read().decode()
        assert text.count("More like this") == 1 and "server" not in answer.headers
        with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
            assert answer.read() == b'{"status":"ok","items":2}'


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_runs_the_script_and_refuses_nothing(index: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    with served(index) as address:
        words = [BROWSER, "--headless", "--no-sandbox", "--enable-logging=stderr", "--virtual-time-budget=9000", "--dump-dom"]
        done = subprocess.run([*words, f"--user-data-dir={tmp_path}", f"{address}/?text=red"], capture_output=True, text=True, timeout=120)
    assert 'class="soft scripted">' in done.stdout and done.stdout.count('class="more"') == 2
    assert "CONSOLE" not in done.stderr, "the policy, or an error of the script"


def test_a_port_that_is_taken(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["ui", str(index), "--port", port, "--device", "cpu"]) == 4
    assert f"cannot serve at 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 2, "nowhere not found"),
        (["{}", "--port", "99999"], 2, "--port 99999: expected 0 to 65,535"),
        (["{}", "--host", "no.such.host.invalid"], 4, "no.such.host.invalid"),
        (["{}", "--top", "201"], 2, "--top: expected 1 to 200"),
    ],
)
def test_wrong_turns(index: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", *(word.format(index) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_without_the_extra(index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "uvicorn":
            raise ModuleNotFoundError("no", name=name)
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    assert main(["ui", str(index)]) == 2
    assert "vlm2vec ui needs uvicorn: pip install 'vlm2vec[ui]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", re.findall("^ +vlm2vec (ui .*)", ui.HELP, re.M))
def test_every_command_that_is_shown_parses(command: str) -> None:
    assert parse(re.split(r"\s{3,}", command)[0].split()).command == "ui"
