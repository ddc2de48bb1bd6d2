"""The README is executed: its Python runs, its commands parse, its targets and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from tests.corpora import jsonl
from vlm2vec.cli import main, parse
from vlm2vec.commands.encode import HELP
from vlm2vec.config import TrainConfig, reference

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"    (make|vlm2vec|accelerate) ", line)]


def test_the_first_example_comes_within_25_lines_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "car.png"):
        Image.new("RGB", (40, 30), (len(name), 100, 200)).save(name)
    assert README[: README.index(BLOCKS[0])].count("\n") + BLOCKS[0].count("\n") <= 25
    exec(compile(BLOCKS[0].replace("runs/quickstart/model", "builtin/tiny-qwen2_vl"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([[")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    words = ["train", *words[words.index("train.py") + 1 :]] if words[0] == "accelerate" else words[1:]
    arguments = parse(words)
    assert arguments.command != "train" or (ROOT / arguments.recipe).is_file()


ENCODE = (ROOT / "docs" / "encode.md").read_text(encoding="utf-8")


def test_the_how_to_of_encoding_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    jsonl(Path("corpus.jsonl"), [{"text": f"number {index}"} for index in range(3)])
    assert main(["encode", "builtin/tiny-qwen2_vl", "corpus.jsonl", "--to", "vectors", "--device", "cpu"]) == 0
    capsys.readouterr()
    for block in re.findall(r"^```python\n(.*?)^```", ENCODE, re.M | re.S):
        exec(compile(block.replace("runs/quickstart/model", "builtin/tiny-qwen2_vl"), "encode.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("(3, 32)") and "3 (3, 32)" in said


@pytest.mark.parametrize("command", re.findall("^ +(vlm2vec .*)", ENCODE + HELP, re.M))
def test_every_command_of_encoding_parses(command: str) -> None:
    words = shlex.split(re.split(r"\s{3,}", command)[0])
    assert parse(words[1:]).command == "encode"


ENGINES = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("config", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_page_on_engines_has_the_launch_line_of_every_config(config: Path) -> None:
    launch = re.search(r"^# Launch: +(.*)", config.read_text(encoding="utf-8"), re.M)
    assert launch is not None and f"\n    {launch[1]}\n" in ENGINES
    words = shlex.split(launch[1])
    assert (ROOT / parse(["train", *words[words.index("train.py") + 1 :]]).recipe).is_file()


def test_the_page_on_engines_names_every_engine_and_the_default_of_every_key() -> None:
    keys = {key: (kind, default) for key, kind, default, _ in reference()}
    assert all(f"| `{engine}` |" in ENGINES for engine in get_args(get_args(get_type_hints(TrainConfig)["engine"])[0]))
    assert f"**`run.timeout`** is {float(keys['run.timeout'][1]):g} minutes" in ENGINES
    assert set(re.findall(r"`((?:run|train|model|lora|data)\.\w+)", ENGINES)) <= keys.keys()


def test_every_link_leads_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    found = [(path, link) for path in documents for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))]
    links = {path.parent / link.split("#")[0] for path, link in found if not link.startswith("http")}
    assert links and [link for link in links if not link.exists()] == []
