"""`vlm2vec serve` as a user starts it: what reaches the server, what it says, and what stops it before."""

from __future__ import annotations

import builtins
import re
import shlex
import signal
import socket
from dataclasses import fields
from typing import Any

import pytest

from tests.serving import tiny
from vlm2vec.cli import main, parse
from vlm2vec.commands import serve as command
from vlm2vec.errors import InputError
from vlm2vec.serve import server
from vlm2vec.serve.batcher import Batcher
from vlm2vec.serve.limits import Limits
from vlm2vec.signals import StopSignal


class Started:
    """What the command gave to the server, which is told to stop at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(command.KEY, raising=False)
        monkeypatch.setattr(command, "load_encoder", lambda given: tiny())
        monkeypatch.setattr(Batcher, "start", lambda batcher: None)
        monkeypatch.setattr(server, "serve", self.serve)

    def serve(self, app: Any, sock: socket.socket, limits: Limits, counts: Any, stop: StopSignal) -> None:
        self.app, self.address, self.limits = app, sock.getsockname(), limits
        sock.close()
        stop.number = signal.SIGTERM


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


def test_every_option_reaches_the_server(started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(command.KEY, "sesame")
    options = [word for number, limit in enumerate(fields(Limits), 11) for word in (f"--max-{limit.name.replace('_', '-')}", str(number))]
    words = ["--port", "0", "--name", "mine", "--chunk-tokens", "77", "--threads", "3", *options]
    assert main(["serve", "builtin/tiny-qwen2_vl", *words]) == 128 + signal.SIGTERM
    found = started.app.inner.routes[0].endpoint.__self__
    assert started.limits == found.limits == Limits(*range(11, 11 + len(fields(Limits))))
    assert (found.key, found.served.name, found.served.dims) == ("sesame", "mine", tiny().backbone.hidden_size)
    assert (found.served.query, found.served.document) == (tiny().query_instruction, tiny().target_instruction)
    assert (found.batcher.chunk_tokens, found.batcher.limits) == (77, started.limits) and len(found.batcher._threads) == 3 + 1
    said = capsys.readouterr()
    assert f"serving mine (32 numbers) on http://127.0.0.1:{started.address[1]}/v1" in said.out
    assert "stopped by a signal" in said.err and "sesame" not in said.out + said.err


@pytest.mark.parametrize(
    ("model", "name"), [("builtin/tiny-qwen2_vl", "builtin/tiny-qwen2_vl"), ("owner/name", "owner/name"), ("{}/model/", "model")]
)
def test_what_clients_call_the_model(started: Started, tmp_path: Any, model: str, name: str) -> None:
    (tmp_path / "model").mkdir()
    assert main(["serve", model.format(tmp_path), "--port", "0"]) == 143
    assert started.app.inner.routes[0].endpoint.__self__.served.name == name


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--port", "65536"], 2, "--port 65536: expected 0 to 65,535"),
        (["--port", "-1"], 2, "--port -1: expected 0 to 65,535"),
        (["--host", "no.such.host.invalid"], 4, "cannot serve at no.such.host.invalid port 8000"),
    ],
)
def test_no_address(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "builtin/tiny-qwen2_vl", *words]) == code
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "builtin/tiny-qwen2_vl", "--port", str(taken.getsockname()[1])]) == 4
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--max-items 0", "--max-pixels -1", "--threads 0", "--port x", "--max-body-bytes 1e6"])
def test_numbers_that_are_none(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "builtin/tiny-qwen2_vl", *words.split()])
    assert ended.value.code == 2 and words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " ", "two\nlines", "schl\u00fcssel", " sesame"])
def test_a_key_that_no_header_can_carry(
    started: Started, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(command.KEY, key)
    assert main(["serve", "builtin/tiny-qwen2_vl", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert f"{command.KEY} is set but" in error and (not key.strip() or key not in error)


def test_an_error_or_a_signal_while_the_model_is_loaded(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(given: Any) -> Any:
        raise InputError("no such model")

    monkeypatch.setattr(command, "load_encoder", missing)
    assert main(["serve", "owner/name", "--port", "0"]) == 2 and "no such model" in capsys.readouterr().err
    monkeypatch.setattr(command, "load_encoder", lambda given: signal.raise_signal(signal.SIGINT))
    assert main(["serve", "owner/name", "--port", "0"]) == 130 and "while the model was loaded" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == "vlm2vec.serve.app":
            raise ModuleNotFoundError("No module named 'starlette'", name="starlette")
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    assert main(["serve", "builtin/tiny-qwen2_vl"]) == 4
    assert "pip install 'vlm2vec[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("shown", re.findall("^ +vlm2vec (serve .*)", command.HELP, re.M))
def test_every_command_that_is_shown_parses(shown: str) -> None:
    assert parse(shlex.split(shown)).command == "serve"
