"""The README is executed: its Python runs, its commands parse, its targets and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.corpora import jsonl
from vlm2vec.cli import main, parse
from vlm2vec.commands.encode import HELP

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


def test_every_link_leads_somewhere() -> None:
    documents = [README, *((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "SECURITY.md"))]
    links = [link for text in documents for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and all((ROOT / link.split("#")[0]).exists() for link in links), links
