"""MMEB's 36 sets, made up in the real layout, through a real tiny model: the same bytes however they were come by."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vlm2vec import fill
from vlm2vec.cli import main
from vlm2vec.data.made import write_made
from vlm2vec.encoder import Encoder
from vlm2vec.evaluate import evaluate, scores_json
from vlm2vec.suite import Suite, load_suite

SOME = ["HatefulMemes", "DocVQA", "VisDial", "CIRR", "WebQA", "EDIS", "MSCOCO", "RefCOCO-Matching"]  # every modality and trap
MODEL = "builtin/tiny-qwen2_vl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_made(folder, load_suite("mmeb"))
    return folder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return Encoder.from_pretrained(MODEL, device="cpu")


def some(folder: Path) -> Suite:
    return load_suite(folder / "datasets.yaml").only(SOME)


def run(encoder: Encoder, suite: Suite, cache: Path, **options: Any) -> str:
    return scores_json(evaluate(encoder, suite, cache, **options).results)


@pytest.fixture(scope="module")
def alone(made: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(encoder, some(made), tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("chunk_tokens", [256, 2048])
def test_the_batch_does_not_matter(made: Path, encoder: Encoder, alone: str, tmp_path: Path, chunk_tokens: int) -> None:
    assert run(encoder, some(made), tmp_path, chunk_tokens=chunk_tokens, workers=1) == alone


def test_two_processes_are_as_good_as_one(made: Path, encoder: Encoder, alone: str, tmp_path: Path, ranks: Callable) -> None:
    ranks(lambda rank: (tmp_path / f"{rank}.json").write_text(run(encoder, some(made), tmp_path / "cache")))
    assert [(tmp_path / f"{rank}.json").read_text() for rank in (0, 1)] == [alone] * 2


@pytest.mark.slow
def test_a_launcher_of_two_processes(made: Path, alone: str, tmp_path: Path) -> None:
    launch = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = f"{launch} --dynamo_backend no --module vlm2vec eval {MODEL} --suite {made / 'datasets.yaml'} --to {tmp_path} --subset"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command.split(), *SOME], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(results) == 1 and results[0]["sets"] == json.loads(alone)["sets"]


def test_shuffled_rows_in_another_place(made: Path, encoder: Encoder, alone: str, tmp_path: Path) -> None:
    moved = shutil.copytree(made, tmp_path / "moved")
    for seed, name in enumerate(SOME):
        file = moved / "MMEB-eval" / name / "test-00000-of-00001.parquet"
        pq.write_table(shuffled(pq.read_table(file), random.Random(seed)), file)
    assert run(encoder, some(moved), tmp_path / "cache") == alone


def shuffled(table: pa.Table, dice: random.Random) -> pa.Table:
    """The rows in another order, and in each the candidates behind the gold."""
    rows = table.to_pylist()
    for row in rows:
        order = [0, *dice.sample(range(1, len(row["tgt_text"])), len(row["tgt_text"]) - 1)]
        for column in ("tgt_text", "tgt_img_path"):
            row[column] = [row[column][place] for place in order]
    return pa.Table.from_pylist(dice.sample(rows, len(rows)), table.schema)


@pytest.mark.slow
def test_killed_again_and_again(
    made: Path, encoder: Encoder, alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Callable
) -> None:
    monkeypatch.setattr(fill, "BLOCK", 8)
    dice, codes = random.Random(3), [-signal.SIGKILL]

    def disturbed(count: int) -> None:
        os.environ["VLM2VEC_FAULT"] = f"*:{count}:kill"
        run(encoder, some(made), tmp_path)

    while codes[-1] == -signal.SIGKILL and len(codes) <= 15:
        codes.append(forked(disturbed, dice.randint(1, 60)))
    assert set(codes) <= {0, -signal.SIGKILL} and len(codes) > 5
    assert run(encoder, some(made), tmp_path) == alone


def test_the_whole_suite_from_the_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", MODEL, "--suite", str(made / "datasets.yaml"), "--to", str(tmp_path), "--dims", "16", "--precisions", "binary"]
    assert main([*words, "--reference-files"]) == 0
    (file,) = tmp_path.glob("tiny-qwen2_vl@*.json")
    results = json.loads(file.read_text())
    assert len(results["sets"]) == 36 and results["missing"] == [] and len(results["grid"]) == 3
    assert results["means"]["overall"]["score"] == pytest.approx(sum(row["score"] for row in results["sets"].values()) / 36)
    folder = file.with_suffix("")
    assert sum(1 for _ in (folder / "predictions.jsonl").open()) == sum(row["n"] for row in results["sets"].values())
    assert len(list((folder / "reference").glob("*_score.json"))) == 36
    said = capsys.readouterr().out
    assert str(file) in said and "Visual7W-Pointing" in said and str(folder / "report.html") in said
    assert main(words) == 0 and "encoded in" not in capsys.readouterr().err  # everything was in the cache
