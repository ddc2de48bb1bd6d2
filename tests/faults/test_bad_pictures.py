"""Training on data of which one picture in a hundred is damaged is training on data where those rows were replaced beforehand."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.faults.common import exit_code, forked_run, killed_at_save, light_recipe
from vlm2vec import checkpoint
from vlm2vec.config import Recipe
from vlm2vec.data.bad import FILE
from vlm2vec.io import read_jsonl
from vlm2vec.trainer import LOG

ROWS, BAD = 300, 6  # per source: 2 %, all of them drawn in 75 steps of 8
DAMAGE = (b"", b"<html>404</html>", None)  # empty, an error page, missing; a fourth kind is cut short


def row(source: str, index: int) -> dict[str, str]:
    picture = f"images/{source}/{index}.png"
    return {
        "qry": "<|image_1|>\nName it\n", "qry_image_path": picture, "pos_text": f"{source} {index % 40}", "pos_image_path": "",
        "neg_text": "", "neg_image_path": "",
    }  # fmt: skip


def write(root: Path, bad: dict[str, list[int]]) -> Path:
    """Two sources with a picture per row."""
    for source in ("one", "two"):
        (root / "images" / source).mkdir(parents=True)
        for index in range(ROWS):
            chance = random.Random(f"{source} {index}")
            Image.new("RGB", (28, 28), tuple(chance.randrange(256) for _ in range(3))).save(root / "images" / source / f"{index}.png")
        for kind, index in enumerate(bad.get(source, [])):
            damage(root / "images" / source / f"{index}.png", kind % 4)
        save_rows(root, source, [row(source, index) for index in range(ROWS)])
    return root


def damage(file: Path, kind: int) -> None:
    content = file.read_bytes()[:40] if kind == 3 else DAMAGE[kind]
    file.unlink() if content is None else file.write_bytes(content)


def save_rows(root: Path, source: str, rows: list[dict[str, str]]) -> None:
    (root / source).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / source / "original.parquet")


def recipe_for(root: Path, run_dir: Path, steps: int = 75, **data: object) -> Recipe:
    from vlm2vec.schema import SourceConfig

    sources = (SourceConfig(name="one"), SourceConfig(name="two"))
    options = {"root": str(root), "sources": sources, "bad_pictures": "skip", "max_bad_fraction": 0.03} | data
    return light_recipe(run_dir, steps=steps, every=25, **options)


@pytest.fixture(scope="module")
def bad() -> dict[str, list[int]]:
    """Single ones, two in a row, and the last row, whose successor is the first."""
    return {"one": [7, 60, 61, 120, 299, 200], "two": [0, 33, 150, 151, 152, 280]}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, bad: dict[str, list[int]]) -> Path:
    return write(tmp_path_factory.mktemp("damaged"), bad)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory, bad: dict[str, list[int]]) -> Path:
    """The rule applied to the rows beforehand, with a loop that knows which pictures are bad."""
    root = write(tmp_path_factory.mktemp("replaced"), {})
    for source, indices in bad.items():
        rows = []
        for index in range(ROWS):
            while index % ROWS in indices:
                index += 1
            rows.append(row(source, index % ROWS))
        save_rows(root, source, rows)
    return root


def test_a_run_with_bad_pictures_is_the_run_on_replaced_rows(
    damaged: Path, replaced: Path, bad: dict[str, list[int]], tmp_path: Path, tally: Callable[..., None]
) -> None:
    assert exit_code(forked_run(recipe_for(damaged, tmp_path / "a"))) == 0
    assert exit_code(forked_run(recipe_for(replaced, tmp_path / "b"))) == 0
    assert (tmp_path / "a" / LOG).read_bytes() == (tmp_path / "b" / LOG).read_bytes()
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    assert not (tmp_path / "b" / FILE).exists()
    listed = read_jsonl(tmp_path / "a" / FILE)
    assert sorted(entry["id"] for entry in listed) == sorted(f"{source}:{index}" for source in bad for index in bad[source])
    assert next(entry["replaced_by"] for entry in listed if entry["id"] == "one:299") == "one:0"
    tally(
        "F12", "damaged pictures, data.bad_pictures=skip", "the log bit for bit that of rows replaced beforehand; each listed once", 2 * BAD
    )


def tensors(run_dir: Path) -> dict[str, list]:
    newest = checkpoint.latest(run_dir)
    assert newest is not None
    return {name: tensor.tolist() for name, tensor in load_file(newest / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.faults)])
def test_killed_and_resumed_the_list_and_the_log_are_the_same(
    workers: int, damaged: Path, tmp_path: Path, tally: Callable[..., None]
) -> None:
    whole, cut = recipe_for(damaged, tmp_path / "a", 40), recipe_for(damaged, tmp_path / "b", 40, workers=workers)
    assert exit_code(forked_run(whole)) == 0
    killed_at_save(cut, 1)
    assert exit_code(forked_run(cut)) == 0
    for name in (LOG, FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tally("F12", "the same, killed and resumed, with and without workers", "the same log and the same list", 1)


@pytest.mark.parametrize(("fraction", "allowed"), [(0.005, 3), (0.0, 0)])
def test_the_budget_stops_at_the_right_count(
    fraction: float, allowed: int, damaged: Path, tmp_path: Path, tally: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(forked_run(recipe_for(damaged, tmp_path / "run", max_bad_fraction=fraction))) == 2
    assert len(read_jsonl(tmp_path / "run" / FILE) if allowed else []) == (allowed + 1 if allowed else 0)
    assert "more than data.max_bad_fraction allows" in capfd.readouterr().err
    tally("F12", "more damaged pictures than data.max_bad_fraction", "exit code 2 at the first one too many, with a table of reasons", 1)


@pytest.mark.slow
def test_a_larger_budget_goes_on_from_there(damaged: Path, tmp_path: Path) -> None:
    assert exit_code(forked_run(recipe_for(damaged, tmp_path / "a", 60, max_bad_fraction=0.005))) == 2
    assert exit_code(forked_run(recipe_for(damaged, tmp_path / "a", 60))) == 0
    assert exit_code(forked_run(recipe_for(damaged, tmp_path / "b", 60))) == 0
    assert (tmp_path / "a" / LOG).read_bytes() == (tmp_path / "b" / LOG).read_bytes()


def test_by_default_a_run_stops_and_names_the_picture(damaged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code(forked_run(recipe_for(damaged, tmp_path / "run", bad_pictures="stop"))) == 2
    assert "data.bad_pictures=skip" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "run")
