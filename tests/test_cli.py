"""The command line as a user meets it: real processes, exit codes, every recipe in its tiny form through `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vlm2vec.cli import main
from vlm2vec.commands.encode import read_items
from vlm2vec.config import load_recipe
from vlm2vec.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def call(*words: str | Path, launcher: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or [sys.executable]), str(ROOT / "train.py"), *map(str, words)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_end_to_end_in_its_tiny_form(recipe: Path, tmp_path: Path) -> None:
    done = call(recipe, "--tiny", f"run.dir={tmp_path}", launcher=[*LAUNCH, "--num_processes", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("recipe.yaml", "log.jsonl", "model/vlm2vec.json", "step-000006/manifest.json"):
        assert (tmp_path / name).exists(), name
    assert str(tmp_path / "model") in done.stdout
    options = load_recipe(recipe).evaluate
    if options.suite is None:
        return
    for name in ("results.json", "report.html", "report.md"):
        assert (tmp_path / name).exists(), name
    assert (tmp_path / "results-before.json").exists() == options.before
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["meta_task"] for row in results["sets"].values()} == {"classification", "vqa", "retrieval", "grounding"}
    assert "Overall, mean of sets" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert "data:image/" in page and "picture missing" not in page


def test_two_processes_take_the_same_first_step_as_one(tmp_path: Path) -> None:
    """The whole path with a process group: same pairs, same global loss and gradient norm to rounding."""
    model = [
        "model.path=builtin/tiny-qwen2_vl",
        "model.family=qwen2_vl",
        "train.precision=fp32",
    ]  # no dropout: its masks depend on the chunks
    recipe = [ROOT / "recipes" / "quickstart.yaml", "--tiny", "evaluate.suite=null", "evaluate.before=false", *model]
    assert call(*recipe, f"run.dir={tmp_path / 'one'}").returncode == 0
    two = call(*recipe, f"run.dir={tmp_path / 'two'}", launcher=[*LAUNCH, "--multi_gpu", "--num_processes", "2"], ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr[-3000:]
    one, both = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(both) == 6
    for left, right in zip(one, both, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(RECIPES[0]), "--tiny", "--dry-run", f"run.dir={tmp_path / 'run'}"]) == 0
    plan = capsys.readouterr().out
    for words in (
        "global batch",
        "negatives per query",
        "chunks",
        "trainable parameters",
        "language",
        "projector",
        "memory per device",
        "% of the draws",
        "epochs",
    ):
        assert words in plan, plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "recipes/quickstrt.yaml"], 2, "did you mean recipes/quickstart.yaml"),
        (["train", "recipes/quickstart.yaml", "train.lrr=1"], 2, "did you mean lr"),
        (["train", "recipes/quickstart.yaml", "--tiny", "train.lr"], 2, "key=value"),
        (
            ["train", "recipes/quickstart.yaml", "data.root=/no/such/folder", "evaluate.suite=null", "run.dir={tmp}/run"],
            2,
            "/no/such/folder",
        ),
        (["eval", "/no/such/model"], 2, "/no/such/model"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "minni"], 2, "minni"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "mmeb"], 2, "data/MMEB-eval does not exist; run vlm2vec data get mmeb-eval"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "builtin/tiny", "--subset", "TinyShape"], 2, "did you mean TinyShapes?"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "builtin/tiny", "--option", "positions=flta"], 2, "expected one of native, flat"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "builtin/tiny", "--device", "gpu"], 2, "--device gpu: "),
        (["encode", "builtin/tiny-qwen2_vl", "/no/such.jsonl", "--to", "x"], 2, "/no/such.jsonl not found"),
    ],
)
def test_wrong_input_ends_with_code_2_and_a_message(
    words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([word.replace("{tmp}", str(tmp_path)) for word in words]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_folder_in_use_ends_with_code_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = (
        f"from pathlib import Path; from vlm2vec import io\nwith io.run_lock(Path({str(tmp_path)!r})): print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert main(["train", str(RECIPES[0]), "--tiny", f"run.dir={tmp_path}"]) == 5
    assert f"pid {holder.pid}" in capsys.readouterr().err
    holder.communicate("\n")


def test_encode_writes_one_row_per_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (30, 30), (255, 0, 0)).save(tmp_path / "red.png")
    rows = ['{"text": "a"}', '{"image": "red.png", "text": "b"}', '"a"']
    (tmp_path / "items.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["encode", "builtin/tiny-qwen2_vl", str(tmp_path / "items.jsonl"), "--to", str(tmp_path / "out.safetensors")]) == 0
    made = load_file(tmp_path / "out.safetensors")["embeddings"]
    assert made.shape[0] == 3 and (made[0] == made[2]).all() and not (made[0] == made[1]).all()
    assert "3 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "items.jsonl:2"), ('{"txt": "a"}', "unknown key 'txt'"), ("[1]", "cannot embed a list"), ("", "items.jsonl:2")],
)
def test_a_broken_line_of_items_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=words):
        read_items(tmp_path / "items.jsonl")


def test_help_is_quick_and_teaches() -> None:
    started = time.perf_counter()
    done = call("--help")
    assert time.perf_counter() - started < 20
    assert "--dry-run" in done.stdout and "--tiny" in done.stdout and "exit codes" in done.stdout
    assert call(launcher=[sys.executable, "-X", "importtime"]).stderr.count("torch") == 0


def test_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    listed = capsys.readouterr().out
    assert "train.chunk_tokens" in listed and "lora.rank" in listed
