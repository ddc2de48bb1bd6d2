"""The command line as a user meets it: real processes, exit codes, every recipe in its tiny form through `accelerate launch`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.corpora import content, jsonl, paint
from vlm2vec import read_vectors
from vlm2vec.cli import main
from vlm2vec.config import load_recipe

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


def call(
    *words: str | Path, launcher: list[str] | None = None, script: Sequence[str] = (str(ROOT / "train.py"),), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or [sys.executable]), *script, *map(str, words)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, cwd=ROOT)


LAUNCHED = ("quickstart",)  # in every run of the tests; all others in the slow ones


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, marks=[] if path.stem in LAUNCHED else pytest.mark.slow, id=path.stem) for path in RECIPES]
)
def test_every_recipe_is_launched_in_its_tiny_form(recipe: Path, tmp_path: Path) -> None:
    done = call(recipe, "--tiny", f"run.dir={tmp_path}", launcher=[*LAUNCH, "--num_processes", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(recipe, tmp_path, done.stdout)


# Their tiny forms differ from another recipe's in numbers alone.
ALIKE = ("qwen2vl_2b_lora", "qwen2vl_7b_lora", "qwen25vl_3b_lora", "smollm2_gpu", "quickstart_scratch")


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in ALIKE else [])
        for path in RECIPES
        if path.stem not in LAUNCHED
    ],
)
def test_every_recipe_runs_end_to_end_in_its_tiny_form(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--tiny", f"run.dir={tmp_path}"]) == 0
    check_run(recipe, tmp_path, capsys.readouterr().out)


def check_run(recipe: Path, tmp_path: Path, said: str) -> None:
    """Everything a run leaves, and what it says at its end."""
    for name in ("recipe.yaml", "log.jsonl", "model/vlm2vec.json", "step-000006/manifest.json"):
        assert (tmp_path / name).exists(), name
    assert str(tmp_path / "model") in said
    options = load_recipe(recipe).evaluate
    if options.suite is None:
        return
    for name in ("results.json", "report.html", "report.md"):
        assert (tmp_path / name).exists(), name
    assert (tmp_path / "results-before.json").exists() == options.before
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["meta_task"] for row in results["sets"].values()} == {"classification", "vqa", "retrieval", "grounding"}
    assert "Overall, mean of sets" in said
    page = (tmp_path / "report.html").read_text()
    assert "data:image/" in page and "picture missing" not in page


@pytest.mark.slow
def test_two_processes_take_the_same_first_step_as_one(tmp_path: Path) -> None:
    """The whole path with a process group: same pairs, same global loss and gradient norm to rounding."""
    model = [
        "model.path=builtin/tiny-qwen2_vl",
        "model.family=qwen2_vl",
        "train.precision=fp32",
    ]  # no dropout: its masks depend on the chunks
    recipe = [ROOT / "recipes" / "quickstart.yaml", "--tiny", "evaluate.suite=null", "evaluate.before=false", *model]
    assert main(["train", *map(str, recipe), f"run.dir={tmp_path / 'one'}"]) == 0
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
        (["eval", "/no/such/model", "--suite", "builtin/tiny"], 2, "/no/such/model"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "minni"], 2, "minni"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "mmeb"], 2, "data/MMEB-eval does not exist; run vlm2vec data get mmeb-eval"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "builtin/tiny", "--subset", "TinyShape"], 2, "did you mean TinyShapes?"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "builtin/tiny", "--option", "positions=flta"], 2, "expected one of native, flat"),
        (["eval", "builtin/tiny-qwen2_vl", "--suite", "builtin/tiny", "--device", "gpu"], 2, "--device gpu: "),
        (["encode", "builtin/tiny-qwen2_vl", "/no/such.jsonl", "--to", "x"], 2, "/no/such.jsonl not found"),
        (["encode", "builtin/tiny-qwen2_vl", "README.md", "--to", "{tmp}/x"], 2, "expected a .jsonl or .parquet file"),
        (["encode", "builtin/tiny-qwen2_vl", "recipes", "--to", "x.safetensors"], 2, "--to x.safetensors: names a folder"),
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


def test_encode_fills_a_folder_and_says_how_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paint(Path("red.png"), (255, 0, 0))
    jsonl(Path("items.jsonl"), [{"text": "a"}, {"image": "red.png", "text": "b", "id": "b"}, "a", {"image": "gone.png"}])
    words = ["encode", "builtin/tiny-qwen2_vl", "items.jsonl", "--to", "out", "--device", "cpu", "--shard-items", "2"]
    assert main(words) == 2
    assert "items.jsonl row 3 (line 4): image 'gone.png': no such file" in capsys.readouterr().err
    assert main([*words, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "3 rows of 32 numbers, float32, 2 shards" in said and "skipped  1 items" in said
    ids, rows = read_vectors("out", verify=True)
    assert ids == [0, "b", 2] and np.allclose(rows[0], rows[2], atol=1e-6) and not np.allclose(rows[0], rows[1], atol=1e-3)
    lines = [line.removeprefix("load").strip() for line in said.splitlines()[-3:]]
    exec("\n".join(lines), {})
    assert capsys.readouterr().out.startswith("0 [") and len(lines) == 3
    assert main([*words, "--skip-bad", "--precision", "int8"]) == 2
    assert 'another precision: "float32" there, "int8" here' in capsys.readouterr().err
    assert main([*words, "--dry-run", "--precision", "int8", "--dims", "8"]) == 0
    said = capsys.readouterr().out
    assert "4 items (jsonl) in 2 shards of 2" in said and "48 bytes of int8 rows, 8 numbers each" in said


def test_encode_with_the_instructions_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm2vec import Encoder

    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu")
    encoder.query_instruction, encoder.target_instruction = "Find it:", "Represent it:"
    encoder.save_pretrained(tmp_path / "model")
    jsonl(tmp_path / "items.jsonl", ["a"])
    given = {"--query": "Find it:", "--target": "Represent it:"}
    for flag, instruction in given.items():
        out = str(tmp_path / flag)
        assert main(["encode", str(tmp_path / "model"), str(tmp_path / "items.jsonl"), "--to", out, flag, "--device", "cpu"]) == 0
        assert json.loads((Path(out) / "manifest.json").read_text())["instruction"] == instruction


@pytest.mark.slow
def test_encode_on_two_processes_makes_the_bytes_of_one(tmp_path: Path) -> None:
    for index in range(6):
        paint(tmp_path / "in" / f"{index}", (40 * index, 90, 9))
    words = ["encode", "builtin/tiny-qwen2_vl", str(tmp_path / "in"), "--shard-items", "2", "--device", "cpu", "--to"]
    launcher = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    two = call("vlm2vec", *words, tmp_path / "two", launcher=launcher, script=["--module"], ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr[-3000:]
    assert main([*words, str(tmp_path / "one")]) == 0
    assert two.stdout.count("6 rows of 32 numbers") == 1 and content(tmp_path / "one") == content(tmp_path / "two")


def test_help_is_quick_and_teaches() -> None:
    done = call("--help")
    assert "--dry-run" in done.stdout and "--tiny" in done.stdout and "exit codes" in done.stdout
    assert call(launcher=[sys.executable, "-X", "importtime"]).stderr.count("torch") == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "vlm2vec", "keys"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interruption_ends_with_a_word_and_its_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm2vec.config.reference", interrupted)
    assert main(["keys"]) == 130
    assert capsys.readouterr().err == "error: interrupted; the same command may be run again\n"


def test_deepspeed_gives_no_alarm_where_there_is_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["keys"]) == 0
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logging.getLogger("DeepSpeed").warning("anything else")
    assert [record.getMessage() for record in caplog.records] == ["anything else"]


def test_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    listed = capsys.readouterr().out
    assert "train.chunk_tokens" in listed and "lora.rank" in listed


def test_pillows_warnings_are_neither_shown_nor_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged pictures make it warn in words of their own; a server would keep them all."""
    kept: dict[object, object] = {}
    assert main(["keys"]) == 0
    for module in ("PIL.TiffImagePlugin", "PIL.Image"):
        warnings.warn_explicit("Possibly corrupt EXIF data", UserWarning, "file", 1, module, kept)
    assert kept.keys() <= {"version"} and "corrupt" not in capsys.readouterr().err
