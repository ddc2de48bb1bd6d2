from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vlm2vec import dist, log
from vlm2vec.errors import InputError


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Leave the package's logger as it was found."""
    logger = logging.getLogger(log.PACKAGE)
    before = (logger.level, list(logger.handlers))
    yield
    logger.level, logger.handlers = before


def test_loggers_lie_below_the_package() -> None:
    assert log.get_logger("vlm2vec.data.images").name == "vlm2vec.data.images"
    assert log.get_logger("vlm2vec").name == "vlm2vec"
    assert log.get_logger("vlm2vecx").name == "vlm2vec.vlm2vecx"
    assert log.get_logger("__main__").name == "vlm2vec.__main__"


def test_without_setup_warnings_are_seen_all_the_same() -> None:
    code = "from vlm2vec import log; log.get_logger('x').info('unseen'); log.get_logger('x').warning('seen')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "seen\n")


def test_setup_twice_writes_once_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("debug")
    log.setup("INFO")
    log.get_logger("x").debug("unseen")
    log.get_logger("x").info("%d pairs", 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(" INFO 3 pairs\n") and captured.err.count("\n") == 1


def test_unknown_level() -> None:
    with pytest.raises(InputError, match="unknown log level 'loud': one of debug, info, warning, error"):
        log.setup("loud")


def test_other_ranks_write_warnings_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 2)
    log.setup("info")
    log.get_logger("x").info("unseen")
    log.get_logger("x").warning("seen")
    assert re.fullmatch(r"\[rank 2\] \S+ WARNING seen\n", capsys.readouterr().err)


def test_progress_is_shown_on_a_terminal_of_the_main_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(enabled: bool | None) -> bool:
        with log.progress(10, "encoding", "item", initial=4, enabled=enabled) as bar:
            bar.update(6)
        return "encoding" in capsys.readouterr().err

    assert [shown(enabled) for enabled in (None, True, False)] == [False, True, False]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert [shown(enabled) for enabled in (None, True, False)] == [True, True, False]
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert [shown(enabled) for enabled in (None, True, False)] == [False, False, False]


def test_log_lines_do_not_break_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    with log.progress(2, "training", "step", enabled=True) as bar:
        bar.update()
        log.get_logger("x").info("line")
        bar.update()
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d INFO line", line) for line in lines)
