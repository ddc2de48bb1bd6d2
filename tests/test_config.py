"""From a file to a recipe: the bad inputs a user will hand in, one by one; types, overrides, inheritance, the tiny form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlm2vec.config import Recipe, differences, dump, load_recipe, parse_recipe, shrink
from vlm2vec.errors import RecipeError

GOOD = """\
model:
  path: builtin/vista-minilm
  family: vlm2vec_vista
  train: [projector]
lora:
  rank: 4
data:
  root: data/mini
  sources:
    - name: emoji
    - name: flags
      weight: 2
loss:
  temperature: 0.03
train:
  steps: 100
  global_batch: 64
  lr: 5e-5
"""


def write(folder: Path, text: str | bytes = GOOD, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def refused(path: Path, *overrides: str, tiny: bool = False) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, tiny=tiny)
    return str(caught.value)


# -- the bad inputs of a recipe, in the words that a user reads


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    near = write(tmp_path, name="phi35_lora.yaml")
    assert refused(tmp_path / "phi35.yaml") == f"{tmp_path}/phi35.yaml not found; did you mean {near}?"
    assert refused(tmp_path / "nowhere" / "x.yaml") == f"{tmp_path}/nowhere/x.yaml not found"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": recipe is empty"),
        ("# nothing\n", ": recipe is empty"),
        ("- a\n- b\n", ":1: expected a mapping, got list"),
        ("word", ":1: expected a mapping, got 'word'"),
        (edited("  rank: 4", "\trank: 4"), ":6: tab used for indentation"),
        (GOOD + "  lr: 1e-4\n", ":19: key 'lr' given twice (first at line 18)"),
        (edited("temperature", "temprature"), ":14: unknown key loss.temprature; did you mean temperature?"),
        (edited("5e-5", '"fast"'), ":18: train.lr: expected number, got 'fast'"),
        (edited("5e-5", "1e"), ":18: train.lr: expected number, got '1e'"),
        (GOOD + '  activation_checkpointing: "False"\n', ':19: train.activation_checkpointing: expected true/false, got string "False"'),
        (GOOD + "  activation_checkpointing: no\n", ':19: train.activation_checkpointing: expected true/false, got string "no"'),
        (GOOD + "  keep_tokens: -1\n", ":19: train.keep_tokens must be >= 0, got -1"),
        (edited("0.03", "0"), ":14: loss.temperature must be > 0 and finite, got 0.0"),
        (edited("0.03", "-1"), ":14: loss.temperature must be > 0 and finite, got -1.0"),
        (edited("0.03", ".nan"), ":14: loss.temperature must be > 0 and finite, got .nan"),
        (GOOD + "  chunk_tokens: 0\n", ":19: train.chunk_tokens must be > 0, got 0"),
        (edited("sources:", "block: 48\n  sources:"), ":9: data.block (48) must divide train.global_batch (64)"),
        (GOOD + "  warmup: 200\n", ":19: train.warmup (200) must be smaller than train.steps (100)"),
        (edited("rank: 4", "rank: 0"), ":6: lora.rank must be >= 1, got 0"),
        (GOOD + "  clip: !!python/object/apply:os.system ['touch x']\n", ":19: tags are not allowed"),
        (GOOD + "#" * 10_000_000, ": recipe too large (more than 64 kB)"),
        (GOOD + "  clip: " + "[" * 5000, ":19: recipe too deep (more than 20 levels)"),
        (GOOD + "  clip: &a [*a]", ":19: anchors and aliases are not allowed"),
        (GOOD + "---\n" + GOOD, ":19: expected one document, found 2"),
        (GOOD.encode() + b"# caf\xe9", f": byte {len(GOOD) + 5} is not UTF-8"),
        (GOOD.encode() + b"\0", f": byte {len(GOOD)} is NUL"),
        (edited("family:", "trust_remote_code: true\n  family:"), ":3: model.trust_remote_code needs model.revision as a 40-character"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    assert refused(path).startswith(f"{path}{message}")


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path)).train.lr == 5e-5
    assert load_recipe(write(tmp_path, edited("5e-5", "1E-4"))).train.lr == 1e-4


@pytest.mark.parametrize("text", ["train.lr", "=1", "train.lr=", ""])
def test_override_without_key_or_value(tmp_path: Path, text: str) -> None:
    assert refused(write(tmp_path), text) == f"override must look like key=value, got '{text}'"


def test_differing_keys_of_two_runs(tmp_path: Path) -> None:
    path = write(tmp_path)
    old = load_recipe(path)
    new = load_recipe(path, ["train.lr=1e-4", "run.dir=x", "data.block=8", "run.trackers=[tensorboard]"])
    assert differences(old, new) == ["data.block: 0 -> 8", "train.lr: 5.0e-05 -> 0.0001"]
    (lora,) = differences(old, load_recipe(path, ["lora=null"]))
    assert lora.startswith("lora: {rank: 4, alpha: 16.0, ") and lora.endswith(" -> null") and len(lora) < 120
    assert differences(old, old) == []


# -- types and places


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 100", "steps: 100.0", ":16: train.steps: expected integer, got 100.0"),
        ("steps: 100", "steps: true", ":16: train.steps: expected integer, got true"),
        ("steps: 100", "steps: 99999999999", ":16: train.steps: at most 2147483647 in size, got 99999999999"),
        ("steps: 100", "steps: [100]", ":16: train.steps: expected integer, got list"),
        ("lr: 5e-5", "lr: true", ":18: train.lr: expected number, got true"),
        ("lr: 5e-5", "lr: null", ":18: train.lr: expected number, got null"),
        ("lr: 5e-5", "lr: {x: 1}", ":18: train.lr: expected number, got mapping"),
        ("root: data/mini", "root: 12", ":8: data.root: expected string, got 12; put it in quotes"),
        ("[projector]", "projector", ":4: model.train: expected list of language, projector, vision, got 'projector'"),
        ("[projector]", "[lens]", ":4: model.train[0]: expected one of language, projector, vision, got 'lens'"),
        ("lr: 5e-5", "lr: 5e-5\n  betas: [0.9]", ":19: train.betas: expected list of 2 numbers, got list"),
        ("lora:", "  resize: huge\nlora:", ":5: model.resize: expected one of low, mid, high or integer or null, got 'huge'"),
        ("lora:", "  resize: 64.5\nlora:", ":5: model.resize: expected one of low, mid, high or integer or null, got 64.5"),
        ("lora:", "  resize: true\nlora:", ":5: model.resize: expected one of low, mid, high or integer or null, got true"),
        ("lora:", "  resize: [low]\nlora:", ":5: model.resize: expected one of low, mid, high or integer or null, got list"),
        ("lora:", "  resize: 0\nlora:", ":5: model.resize must be >= 1, got 0"),
        ("  rank: 4", "  - rank", ":5: lora: expected a mapping, got list"),
        ("weight: 2", "weight: -2", ":12: data.sources[1].weight must be >= 0 and finite, got -2.0"),
        ("weight: 2", "wieght: 2", ":12: unknown key data.sources[1].wieght; did you mean weight?"),
        ("name: flags", "path: flags", ":11: data.sources[1].name is required"),
        ("name: flags", "name: emoji", ":9: data.sources names 'emoji' 2 times"),
        ("model:", "modle:", ":1: unknown key modle; did you mean model?"),
        ("  root: data/mini\n", "", ":7: data.root is required"),
        ("  lr: 5e-5\n", "  zzz: 1\n", ":18: unknown key train.zzz; known: steps, epochs, global_batch,"),
        ("lora:\n", "<<: {}\nlora:\n", ":5: unknown key <<; known: run, model, lora,"),
    ],
)
def test_wrong_types_and_names(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, edited(old, new))
    assert refused(path).startswith(f"{path}{message}")


def test_whole_numbers_serve_where_numbers_are_wanted(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.data.sources[1].weight == 2.0 and isinstance(recipe.data.sources[1].weight, float)


@pytest.mark.parametrize(("written", "read"), [("high", "high"), ("336", 336), ("null", None)])
def test_a_key_may_take_a_name_or_a_number(tmp_path: Path, written: str, read: str | int | None) -> None:
    recipe = load_recipe(write(tmp_path, edited("lora:", f"  resize: {written}\nlora:")))
    assert recipe.model.resize == read
    assert parse_recipe(dump(recipe)) == recipe


def test_folders_and_impossible_names_are_not_recipes(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} is not a file"
    assert refused(tmp_path / ("x" * 300)).endswith(" cannot be read: File name too long")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "loop.yaml not found" in refused(tmp_path / "loop.yaml")


def test_tags_execute_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refused(write(tmp_path, f"a: !!python/object/apply:os.system ['touch {canary}']\n"))
    refused(write(tmp_path, GOOD), f"train.lr=!!python/object/apply:pathlib.Path.touch [{canary}]")
    assert not canary.exists()


# -- defaults, dump, digest


def test_run_folder_defaults_to_the_name_of_the_recipe(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, name="my.recipe.yaml")).run.dir == "runs/my.recipe"
    assert load_recipe(write(tmp_path), ["run.dir=/x/y"]).run.dir == "/x/y"


def test_dump_is_read_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["model.path='1e5'", "data.root='yes'", 'run.dir="a: b # c"', "model.revision='010'"])
    assert parse_recipe(dump(recipe)) == recipe
    assert load_recipe(write(tmp_path, dump(recipe), "again.yaml")) == recipe


def test_digest_does_not_depend_on_how_the_recipe_is_written(tmp_path: Path) -> None:
    head, tail = GOOD.split("data:\n")
    shuffled = "data:\n" + tail.replace("5e-5", "0.00005") + head
    assert load_recipe(write(tmp_path)).digest == load_recipe(write(tmp_path, shuffled, "s.yaml")).digest


def test_reading_a_recipe_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, vlm2vec.config as c; c.load_recipe(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(write(tmp_path))], cwd=Path(__file__).parents[1], check=False).returncode == 0


# -- overrides


def test_overrides_of_every_type(tmp_path: Path) -> None:
    overrides = ["train.lr=1e-4", "lora=null", "data.sources=[{name: a, cap: 5}]", "loss.symmetric=true", "run.trackers=[tensorboard]"]
    recipe = load_recipe(write(tmp_path), [*overrides, "train.lr=2e-4"])
    assert (recipe.train.lr, recipe.lora, recipe.loss.symmetric, recipe.run.trackers) == (2e-4, None, True, ("tensorboard",))
    assert [(source.name, source.cap) for source in recipe.data.sources] == [("a", 5)]


def test_an_override_of_one_key_keeps_its_neighbours_or_their_defaults(tmp_path: Path) -> None:
    kept = load_recipe(write(tmp_path), ["lora.alpha=1"]).lora
    assert kept is not None and (kept.rank, kept.alpha) == (4, 1.0)
    again = load_recipe(write(tmp_path, edited("lora:\n  rank: 4", "lora: null")), ["lora.rank=2"]).lora
    assert again is not None and (again.rank, again.alpha) == (2, 16.0)


def test_an_override_is_the_same_as_an_edit(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path), ["train.steps=7"]).digest == load_recipe(write(tmp_path, edited("steps: 100", "steps: 7"))).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lrr=1", "override train.lrr=1: unknown key train.lrr; did you mean lr?"),
        ("trian.lr=1", "override trian.lr=1: unknown key trian; did you mean train?"),
        ("train.lr=fast", "override train.lr=fast: train.lr: expected number, got 'fast'"),
        ("train.lr=-1", "override train.lr=-1: train.lr must be > 0 and finite, got -1.0"),
        ("train.lr.x=1", "override train.lr.x=1: train.lr: expected number, got mapping"),
        ("data.sources.0.name=x", "override data.sources.0.name=x: data.sources: expected list of mappings, got mapping"),
        ("train..lr=1", "override train..lr=1: unknown key train.; known: "),
        ("train.lr=[1", "override train.lr=[1: not YAML: "),
        ("train.lr=1\n---\n2", "override train.lr=1\\n---\\n2: expected one document, found 2"),
        ("train.lr=&a 1", "override train.lr=&a 1: anchors and aliases are not allowed"),
        ("train=\udcff", "override train=\\udcff: byte 0 is not UTF-8"),
        ("model=null", "override model=null: model: expected a mapping, got null"),
        ("base=x.yaml", "override base=x.yaml: unknown key base"),
    ],
)
def test_bad_overrides(tmp_path: Path, text: str, message: str) -> None:
    assert refused(write(tmp_path), text).startswith(message)


# -- inheritance


def test_a_child_wins_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "parent.yaml")
    child = write(tmp_path, "base: parent.yaml\ntrain: {lr: 1e-3}\ndata:\n  sources: [{name: cards}]\nlora: null\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.train.lr, recipe.train.steps, recipe.lora, recipe.data.root) == (1e-3, 100, None, "data/mini")
    assert [source.name for source in recipe.data.sources] == ["cards"] and recipe.run.dir == "runs/child"


def test_grandparents_and_other_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, GOOD, "a.yaml")
    write(tmp_path, "base: ../a.yaml\ntrain: {lr: 1.0, clip: 2}\n", "sub/b.yaml")
    recipe = load_recipe(write(tmp_path, "base: sub/b.yaml\ntrain: {lr: 3.0}\n", "c.yaml"))
    assert (recipe.train.lr, recipe.train.clip, recipe.train.steps) == (3.0, 2.0, 100)


def test_errors_name_the_file_that_holds_the_key(tmp_path: Path) -> None:
    parent = write(tmp_path, edited("rank: 4", "rank: 0"), "parent.yaml")
    child = write(tmp_path, "base: parent.yaml\ntrain: {lr: 1e-3}\n", "child.yaml")
    assert refused(child).startswith(f"{parent}:6: lora.rank")
    write(tmp_path, GOOD, "parent.yaml")
    write(tmp_path, "base: parent.yaml\ntrain:\n  epochs: 1\n", "child.yaml")
    assert refused(child).startswith(f"{parent}:16: train.steps (100) and train.epochs (1.0): exactly one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: r.yaml\n", "base files form a circle"),
        ("base: missing.yaml\n", "missing.yaml not found"),
        ("base: [a]\n", "base: expected the path of a recipe, got list"),
        ("base: null\n", "base: expected the path of a recipe, got null"),
        ("base: .\n", "is not a file"),
    ],
)
def test_bad_bases_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert refused(path).startswith(f"{path}:1: ") and message in refused(path)


def test_a_longer_circle_and_an_endless_chain(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    assert "base files form a circle" in refused(write(tmp_path, "base: a.yaml\n", "b.yaml"))
    for index in range(40):
        write(tmp_path, f"base: {index + 1}.yaml\n", f"{index}.yaml")
    assert "a chain of more than 20" in refused(tmp_path / "0.yaml")


# -- the tiny form


def tiny(tmp_path: Path, *overrides: str, text: str = GOOD) -> Recipe:
    return load_recipe(write(tmp_path, text), overrides, tiny=True)


def test_tiny_shrinks_sizes(tmp_path: Path) -> None:
    text = edited("sources:", "block: 32\n  workers: 4\n  sources:")
    text += "  warmup: 50\n  chunk_tokens: 999\nevaluate: {suite: mini, before: true}\n"
    recipe = tiny(tmp_path, text=text)
    assert (recipe.model.path, recipe.data.root, recipe.run.dir) == ("builtin/tiny-vlm2vec_vista", "builtin/tiny", "runs/r-tiny")
    assert (recipe.train.steps, recipe.train.warmup, recipe.train.global_batch, recipe.train.chunk_tokens) == (6, 1, 8, 256)
    assert (recipe.data.block, recipe.data.workers, recipe.checkpoint.every) == (4, 0, 3)
    assert (recipe.evaluate.limit, recipe.evaluate.suite, recipe.evaluate.before) == (4, "builtin/tiny", True)


def test_tiny_shrinks_what_most_recipes_do_not_name(tmp_path: Path) -> None:
    text = edited("lora:", "  min_pixels: 100000\n  max_pixels: 200000\n  max_tokens: 40\n  resize: high\nlora:").replace(
        "weight: 2", "cap: 100"
    )
    text += "  accumulate: 16\nrun: {trackers: [tensorboard]}\nevaluate: {before: true}\n"
    recipe = tiny(tmp_path, text=text)
    assert (recipe.model.min_pixels, recipe.model.max_pixels, recipe.model.max_tokens) == (56 * 56, 112 * 112, 40)
    assert (recipe.train.accumulate, recipe.run.trackers, recipe.data.sources[1].cap, recipe.evaluate.before) == (2, (), 16, True)
    assert (recipe.model.resize, tiny(tmp_path).model.resize, tiny(tmp_path).model.max_tokens) == (64, None, 64)


def test_tiny_keeps_options_and_source_names(tmp_path: Path) -> None:
    text = edited("rank: 4", "rank: 4\n  dora: true\n  dropout: 0.1").replace("temperature: 0.03", "symmetric: true\n  duplicates: mask")
    full, small = load_recipe(write(tmp_path, text)), tiny(tmp_path, text=text)
    assert (small.lora, small.loss, small.model.train) == (full.lora, full.loss, full.model.train)
    assert [(source.name, source.weight) for source in small.data.sources] == [("emoji", None), ("flags", 2.0)]
    assert (small.train.schedule, small.train.precision) == (full.train.schedule, full.train.precision)


@pytest.mark.parametrize("block", [0, 1, 2, 4, 8, 64])
def test_a_tiny_block_divides_the_tiny_batch(tmp_path: Path, block: int) -> None:
    assert tiny(tmp_path, text=edited("sources:", f"block: {block}\n  sources:")).data.block == min(block, 4)


def test_a_tiny_block_of_an_odd_size(tmp_path: Path) -> None:
    text = edited("sources:", "block: 3\n  sources:").replace("global_batch: 64", "global_batch: 63")
    assert tiny(tmp_path, text=text).data.block == 2


def test_epochs_become_steps_in_the_tiny_form(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, text=edited("steps: 100", "epochs: 2"))
    assert (recipe.train.steps, recipe.train.epochs) == (6, None)


def test_tiny_needs_no_pins_and_no_gpu(tmp_path: Path) -> None:
    pins = f"family: phi3_v\n  revision: {'a' * 40}\n  trust_remote_code: true\n  attention: flash_attention_2\n  max_pixels: 1000000"
    model = tiny(tmp_path, text=edited("family: vlm2vec_vista", pins)).model
    assert (model.revision, model.trust_remote_code, model.attention, model.max_pixels) == (None, False, "sdpa", 112 * 112)


def test_overrides_win_over_the_tiny_form(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "train.steps=2", "evaluate.suite=mini", "run.dir=x", "model.family=qwen2_vl")
    assert (recipe.train.steps, recipe.evaluate.suite, recipe.run.dir) == (2, "mini", "x")
    assert recipe.model.path == "builtin/tiny-qwen2_vl"


def test_tiny_needs_the_family(tmp_path: Path) -> None:
    path = write(tmp_path, edited("  family: vlm2vec_vista\n", ""))
    assert refused(path, tiny=True).startswith("model.family is needed by the tiny form")
    assert load_recipe(path, ["model.family=smolvlm"], tiny=True).model.path == "builtin/tiny-smolvlm"


def test_the_tiny_form_of_a_bad_recipe_is_refused_for_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, edited("5e-5", "-1"))
    assert refused(path, tiny=True).startswith(f"{path}:18: train.lr must be > 0")
    message = "override data.block=16: data.block (16) must divide train.global_batch (8)"
    assert refused(write(tmp_path), "data.block=16", tiny=True) == message


def test_shrinking_twice_changes_only_the_folder(tmp_path: Path) -> None:
    small = tiny(tmp_path)
    assert shrink(small).digest == small.digest
