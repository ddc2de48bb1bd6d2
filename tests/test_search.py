"""Searching as a user does: the two commands, what they print, the page, pictures in the terminal, and every wrong turn."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import jsonl, paint, png
from tests.pages import EVIL, EVIL_FILE, Tags
from vlm2vec import dist
from vlm2vec.cli import main, parse
from vlm2vec.commands import index as index_command
from vlm2vec.commands import search as search_command
from vlm2vec.commands import terminal
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.index import Hit
from vlm2vec.report.found import render

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
MODEL = "builtin/tiny-qwen2_vl"
COLOURS = {"red.png": (220, 20, 20), "green.png": (20, 220, 20), "sub/blue.png": (20, 20, 220)}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and their index."""
    folder = tmp_path_factory.mktemp("search")
    for name, colour in COLOURS.items():
        paint(folder / "pictures" / name, colour)
    assert main(["index", str(folder / "pictures"), "--model", MODEL, "--to", str(folder / "index"), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(here)
    return here


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_a_picture_finds_itself_and_the_table_says_so(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "search", "index", "--image", "pictures/sub/blue.png", "--top", "2").splitlines()
    assert lines[0] == "pictures/sub/blue.png" and re.match(r" +1 +1\.0000  sub/blue\.png$", lines[1])
    assert len(lines) == 4 and lines[-1] == "among 3 items, exact"


def test_json_has_everything_and_several_queries_come_from_a_file(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(Path("q.jsonl"), [{"image": "pictures/red.png", "id": "r"}, {"text": "green", "instruction": "Own:"}, "plain"])
    lines = [json.loads(line) for line in run(capsys, "search", "index", "--queries", "q.jsonl", "--json").splitlines()]
    assert [line["id"] for line in lines] == ["r", 1, 2] and all(len(line["results"]) == 3 for line in lines)
    assert all([result["rank"] for result in line["results"]] == [1, 2, 3] for line in lines)
    best = lines[0]["results"][0]
    assert best["id"] == "red.png" and best["score"] == pytest.approx(1, abs=1e-6) and best["images"] == [str(inside / "pictures/red.png")]
    scores = [result["score"] for result in lines[1]["results"]]
    assert scores == sorted(scores, reverse=True)
    words = ["night", "--image", "pictures/red.png", "--instruction", "Find:", "--json", "--top", "1"]
    both = json.loads(run(capsys, "search", "index", *words))
    assert both["results"][0]["score"] < 0.9999, "the text counts too"
    other = json.loads(run(capsys, "search", "index", *words[:3], "--instruction", "Say:", *words[5:]))
    assert other["results"][0]["score"] != both["results"][0]["score"], "and the instruction"


def test_the_page_holds_all_it_shows(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "search", "index", "a <b>red</b> car", "--image", "pictures/red.png", "--html", "found.html")
    page = Path("found.html").read_text()
    assert page.count("data:image/webp;base64,") == 4 and page.count('<li><div class="frame">') == 3
    assert "a &lt;b&gt;red&lt;/b&gt; car" in page and "<b>red" not in page and not re.search(r"(src|href)=\"http", page)


def test_a_page_with_pictures_that_are_gone_and_pictures_without_files(tmp_path: Path) -> None:
    meta = {"root": str(tmp_path), "items": 3, "source": "x", "instruction": "", "loading": {"path": "m"}, "approximate": {"recall": 0.951}}
    small = io.BytesIO()
    paint(tmp_path / "q.png", (1, 2, 3))
    from PIL import Image

    Image.new("RGB", (7, 5)).save(small, "WEBP")
    gone, inside = Hit(0.5, "gone", 0, "", "", (tmp_path / "gone.png",)), Hit(0.25, 7, 1, "words", "", (), small.getvalue())
    hits = [gone, inside, Hit(0, "t", 2, "", "", ())]
    page = render(meta, [(Item("one"), hits), (Item("", (ImageRef(tmp_path / "q.png"),)), hits)], "Find:", True)
    assert page.count("picture missing") == 2 and page.count('width="7" height="5"') == 2 and "95.1%" in page
    assert "2 queries" in page and "A picture" in page and "0.250" in page


def test_what_would_like_to_be_code_stays_text(tmp_path: Path) -> None:
    """Queries, instructions, ids, texts, names of pictures and places: those of an index are whatever its input held."""
    paint(tmp_path / EVIL_FILE, (1, 2, 3))
    meta: dict[str, Any] = {"root": str(tmp_path), "items": 2, "source": EVIL, "instruction": EVIL, "loading": {"path": EVIL}}
    meta["approximate"] = {"recall": 0.9}
    hits = [Hit(0.5, EVIL_FILE, 0, EVIL, EVIL, (tmp_path / EVIL_FILE,)), Hit(0.25, EVIL, 1, EVIL, "", (tmp_path / "gone" / EVIL_FILE,))]
    for asked in ([(Item(EVIL), hits)], [(Item(EVIL), hits), (Item("", (ImageRef(tmp_path / EVIL_FILE),)), [])]):
        tags = Tags(render(meta, asked, EVIL, True))
        assert tags.active() == [] and tags.words.count(EVIL) > 5 and EVIL_FILE in tags.words
        assert tags.names.count("img") == len(asked), "the picture that is there, and that of the second query"


def test_a_picture_outside_its_folder_is_not_shown(tmp_path: Path) -> None:
    paint(tmp_path / "secret.png", (1, 2, 3))
    (tmp_path / "root").mkdir()
    meta = {"root": str(tmp_path / "root"), "items": 1, "source": "x", "instruction": "", "loading": {"path": "m"}, "approximate": None}
    hit = Hit(0.5, "a", 0, "", "", (tmp_path / "root" / ".." / "secret.png",))
    assert "data:image" not in render(meta, [(Item("x"), [hit])], "", False)


def test_no_control_character_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hit = Hit(0.5, "\x1b]0;title\x07\nforged", 0, "\x1b[2J\nwords\x9b1m", "", ())
    search_command._show(Item("\x1b[31mred"), [hit])
    said = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", said) and said.count("\n") == 2


def test_several_ranks_are_refused_before_the_model_is_loaded(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index_command, "load_encoder", None)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    assert main(["index", "pictures", "--model", MODEL, "--to", "other", "--device", "cpu"]) == 2
    assert "one process makes an index, and this is one of 2" in capsys.readouterr().err and not Path("other").exists()


def test_index_again_needs_no_model_and_a_moved_one_is_named(inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"image": [{"bytes": png((9, 9, 9)), "path": None}], "caption": ["grey"]}), tmp_path / "p.parquet")
    words = [str(tmp_path / "p.parquet"), "--to", str(tmp_path / "i"), "--columns", "text=caption"]
    said = run(capsys, "index", *words, "--model", MODEL, "--instruction", "Say:")
    assert "1 items, 32 numbers each" in said and "1 new, 0 changed, 0 gone; 1 encoded" in said and "vlm2vec search" in said
    assert "0 new, 0 changed, 0 gone; 0 encoded" in run(capsys, "index", *words, "--instruction", "Say:")
    assert "grey" in run(capsys, "search", str(tmp_path / "i"), "grey", "--model", MODEL)
    assert main(["search", str(tmp_path / "i"), "grey", "--model", "builtin/tiny-llava", "--device", "cpu"]) == 2
    assert "is another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "nowhere", "x"], "nowhere not found"),
        (["search", "pictures", "x"], "pictures holds no index; make one with vlm2vec index"),
        (["search", "index"], "nothing to look for: give a text"),
        (["search", "index", "  "], "nothing to look for: give a text"),
        (["search", "index", "x", "--queries", "q.jsonl"], "give one or the other"),
        (["search", "index", "--queries", "none.jsonl"], "none.jsonl: expected a .jsonl file"),
        (["search", "index", "--queries", "empty.jsonl"], "empty.jsonl: no rows"),
        (["search", "index", "--image", "words.txt"], "not an image (looks like text"),
        (["search", "index", "--image", "gone.png"], "no such file"),
        (["search", "index", "x", "--top", "10001"], "top: expected 1 to 10,000, got 10,001"),
        (["search", "index", "x", "--approximate"], "make them with vlm2vec index --approximate"),
        (["search", "index", "x", "--device", "gpu"], "--device gpu"),
        (["index", "none", "--to", "i"], "none not found"),
        (["index", "bare", "--to", "i", "--model", MODEL], "bare holds no pictures and no .jsonl or .parquet file"),
        (["index", "pictures", "--to", "i"], "--model: say which model is to encode the items (i "),
        (["index", "pictures", "--to", "words.txt"], "--to words.txt: names a folder, and that is a file"),
        (["index", "pictures", "--to", "bare", "--model", MODEL], "bare holds notes.txt but no index.sqlite"),
    ],
)
def test_wrong_turns_end_with_code_2_and_a_message(
    words: list[str], message: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("words.txt").write_text("only words")
    Path("empty.jsonl").write_text("")
    Path("bare").mkdir(exist_ok=True)
    (Path("bare") / "notes.txt").write_text("notes")
    assert main(words if "--device" in words else [*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("command", re.findall("^ +(vlm2vec (?:index|search) .*)", DOCS + index_command.HELP + search_command.HELP, re.M))
def test_every_command_that_is_shown_parses(command: str) -> None:
    assert parse(shlex.split(re.split(r"\s{3,}", command)[0])[1:]).command in ("index", "search")


# -- the terminal ------------------------------------------------------------------------------------------------------------------------


def in_a_terminal(forked: Callable[..., int], draw: Callable[[], None], kind: str = "both", **environment: str) -> str:
    """What a function writes to a terminal of its own that answers no question about graphics."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 80, 480, 640))

    def child() -> None:
        os.environ.update(environment)
        for descriptor in {"out": (1,), "both": (0, 1)}[kind]:
            os.dup2(theirs, descriptor)
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        draw()
        sys.stdout.flush()

    assert forked(child) == 0
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            break
        found += part
        if not part:
            break
    os.close(ours)
    return found.decode()


def test_pictures_are_drawn_in_a_terminal_and_nowhere_else(here: Path, forked: Callable[..., int]) -> None:
    pytest.importorskip("textual_image")

    def draw() -> None:
        paint_ = terminal.painter()
        if paint_ is not None:
            paint_(here / "pictures" / "red.png")
            paint_(here / "gone.png")

    assert terminal.painter() is None, "tests have no terminal"
    shown = in_a_terminal(forked, draw, TERM="xterm-256color", NO_COLOR="", COLORTERM="truecolor")
    assert "\N{UPPER HALF BLOCK}" in shown and "2;220;20;20" in shown and "cannot be read any more" in shown
    assert in_a_terminal(forked, draw, "out", TERM="xterm-256color", NO_COLOR="") == ""
    assert in_a_terminal(forked, draw, TERM="xterm-256color", NO_COLOR="1") == ""
    assert in_a_terminal(forked, draw, TERM="dumb", NO_COLOR="") == ""
