"""The tutorial of docs/own_data.md is run as it stands, on a few shapes and a tiny model; its table says what the schema knows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import jsonl
from vlm2vec.cli import main, parse
from vlm2vec.config import load_recipe
from vlm2vec.data.mmeb import read_set
from vlm2vec.data.own.schema import ITEM_KEYS, ROW_KEYS, read_row
from vlm2vec.data.tiny import ALL
from vlm2vec.suite import load_suite

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [shlex.split(line) for line in re.findall(r"^    ((?:vlm2vec|python) .*)", PAGE, re.M)]
TINY = ["model.path=builtin/tiny-vlm2vec_vista", "train.steps=3", "train.warmup=0", "train.global_batch=6"]


def icons(folder: Path) -> None:
    """What the first command builds, in small."""
    rows = [
        {"qry": f"Find the icon with the given name: {thing.name}\n", "pos_image_path": f"images/{thing.file(0).replace(' ', '-')}"}
        for thing in ALL
    ]
    (folder / "images").mkdir(parents=True)
    (folder / "IconNames_t2i").mkdir()
    for thing, row in zip(ALL, rows, strict=True):
        thing.draw(0).save(folder / row["pos_image_path"])
    pq.write_table(pa.Table.from_pylist(rows), folder / "IconNames_t2i" / "original-00000-of-00001.parquet")


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = []
    for program, *words in COMMANDS:
        if program == "python":
            assert BLOCKS[0].startswith(f"# {words[0]}\n")
            exec(compile(BLOCKS[0], "own_data.md", "exec"), {})
        elif words == ["data", "get", "mini"]:
            icons(Path("data/mini/train"))
        else:
            extra = TINY if words[0] == "train" else ["--device", "cpu", "--chunk-tokens", "256"] if words[0] == "eval" else []
            assert main([*words, *extra]) == 0, capsys.readouterr().err
        done.append(words[0])
    assert done == ["data", "photos.py", *["data"] * 4, "train", "eval"]
    assert len(load_suite("photos/split/eval.jsonl", "photos").sets) == 1
    results = [json.loads(Path(f"runs/own_data/{name}.json").read_text()) for name in ("results-before", "results")]
    assert [set(found["sets"]) for found in results] == [{"eval"}] * 2
    exec(compile(BLOCKS[1], "own_data.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().endswith(".png")
    assert main(["data", "validate", "photos/pairs.jsonl", "--model", "runs/own_data/model"]) == 0
    assert re.search(r"^  tokens +min \d", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_exists(command: list[str]) -> None:
    assert command[0] == "python" or parse(command[1:]).command == command[1]


def test_the_tables_list_every_key() -> None:
    tables = re.findall(r"^\| key \| value .*?\n\n", PAGE, re.M | re.S)
    assert [set(re.findall(r"^\| `(\w+)`", table, re.M)) for table in tables] == [set(ROW_KEYS), set(ITEM_KEYS)]


def test_the_rows_shown_are_right_and_the_set_shown_reads_them(tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = [json.loads(line) for line in re.findall(r'^    (\{"(?:query|id)".*)', PAGE, re.M)]
    assert len(shown) == 3 and [read_row(row)[1] for row in shown] == [[], [], []]
    jsonl(tmp_path / "split" / "eval.jsonl", shown)
    sheet, source = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "datasets.yaml").write_text(sheet)
    spec = load_suite(tmp_path).sets[0]
    assert (len(read_set(tmp_path, spec, tmp_path).queries), spec.metric) == (3, "ndcg_linear@10")
    recipe = load_recipe(ROOT / "recipes" / "own_data.yaml")
    assert f"name: {recipe.data.sources[0].name}\n      path: {recipe.data.sources[0].path}\n" in source
