"""Every file in recipes/: it loads, says what it is, explains its keys, has a tiny form; damage ends in a RecipeError or in a recipe."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vlm2vec.config import dump, load_recipe, parse_recipe, reference
from vlm2vec.errors import RecipeError
from vlm2vec.strict_yaml import Node, dump_plain, parse
from vlm2vec.suite import is_data_file

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
REFERENCE = {key: (kind, default) for key, kind, default, _ in reference()}
TRIALS = 12  # of each kind of damage to each recipe
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def keys_of(node: Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line) of every key, in the order of the file."""
    if isinstance(node.value, list):
        for item in node.value:
            yield from keys_of(item, f"{prefix}[]")
    if isinstance(node.value, dict):
        for name, child in node.value.items():
            key = f"{prefix}.{name}" if prefix else name
            yield key, int(child.where.rpartition(":")[2])
            yield from keys_of(child, key)


def reversed_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: reversed_keys(tree[name]) for name in reversed(tree)}
    return [reversed_keys(item) for item in tree] if isinstance(tree, list | tuple) else tree


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "quickstart_scratch", "smollm2_gpu", "phi35_lora"}


@each_recipe
@pytest.mark.parametrize("tiny", [False, True], ids=["full", "tiny"])
def test_loads_and_reads_back_what_it_dumps(path: Path, tiny: bool) -> None:
    recipe = load_recipe(path, tiny=tiny)
    assert parse_recipe(dump(recipe)) == recipe
    assert parse_recipe(dump_plain(reversed_keys(asdict(recipe)))).digest == recipe.digest


@each_recipe
def test_the_tiny_form_keeps_the_options(path: Path) -> None:
    full, tiny = load_recipe(path), load_recipe(path, tiny=True)
    assert tiny.model.path == f"builtin/tiny-{full.model.family}" and tiny.run.dir == f"{full.run.dir}-tiny"
    assert (tiny.lora, tiny.loss, tiny.model.train, tiny.model.pooling) == (full.lora, full.loss, full.model.train, full.model.pooling)
    assert [source.name for source in tiny.data.sources] == [source.name for source in full.data.sources]
    assert (tiny.train.steps, tiny.train.global_batch) == (6, 8)


@each_recipe
def test_the_header_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert re.findall(r"^# (\w+): +\S", header, re.MULTILINE) == ["What", "Hardware", "Expected", "Launch"]
    assert header.rsplit("# Launch:", 1)[1].split()[-1] == f"recipes/{path.name}"


@each_recipe
def test_every_key_is_explained_with_type_and_default(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    explained: set[str] = set()
    for key, line in keys_of(parse(path.read_bytes(), path.name)):
        _, _, comment = lines[line - 1].partition("  # ")
        if key in REFERENCE and key not in explained and not (key == "lora" and "null" not in lines[line - 1]):
            kind, default = REFERENCE[key]
            ending = f" ({kind}; required)" if default == "required" else f" ({kind}; default {default})"
            assert comment.endswith(ending) and len(comment) > len(ending), f"{path.name}:{line}: {key} must end with{ending}"
        assert comment or key in explained, f"{path.name}:{line}: {key} has no comment"
        explained.add(key)


@each_recipe
def test_the_sources_are_the_training_sets_of_its_suite(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.evaluate.suite is None or is_data_file(recipe.evaluate.suite):
        pytest.skip("belongs to no suite of this repository")
    sheet = parse((FOLDER.parent / "benchmarks" / str(recipe.evaluate.suite) / "datasets.yaml").read_bytes(), "datasets.yaml").value
    folders = [Path(row.value["path"].value).name for row in sheet["train"].value]
    assert [source.path or source.name for source in recipe.data.sources] == folders
    assert [source.name for source in recipe.data.sources] == [row.value["name"].value for row in sheet["train"].value]


def test_the_table_has_a_row_for_every_recipe() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in RECIPES if f"| [`{path.name}`]({path.name})" not in table] == []


# -- damage


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key and list element."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in items:
        yield (*path, name)
        yield from leaves(child, (*path, name))


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "word",
    "1e-4",
    [],
    [[]],
    {},
    {"a": {"b": 1}},
    "x" * 5000,
]


def damaged(tree: Any, draw: random.Random) -> str:
    """The YAML of `tree` after one to three mutations: a key deleted or renamed, a value replaced or nested one level deeper."""
    tree = reversed_keys(reversed_keys(tree))
    for _ in range(draw.randint(1, 3)):
        *parents, name = draw.choice(list(leaves(tree)))
        holder = tree
        for parent in parents:
            holder = holder[parent]
        kind = draw.choice(["delete", "rename", "value", "value", "value", "nest"])
        old = holder.pop(name)
        if kind == "rename" and isinstance(holder, dict):
            holder[str(name) + draw.choice("xs_.")] = old
        elif kind != "delete":
            value = {name: old} if kind == "nest" else draw.choice(VALUES)
            holder.update({name: value}) if isinstance(holder, dict) else holder.insert(name, value)
    return dump_plain(tree)


def scribbled(text: str, draw: random.Random) -> bytes:
    """The file after some of its bytes were replaced, removed, doubled or swapped for YAML's own signs."""
    data = bytearray(text.encode())
    for _ in range(draw.randint(1, 5)):
        start = draw.randrange(len(data))
        stop = start + draw.choice([0, 1, 1, 20])
        data[start:stop] = draw.choice(
            [b"", b"\t", b": ", b"- ", b"\n", b"&a ", b"*a", b"!!x ", b"---\n", b"{", b"\x00", b"\xff", b"'", data[start:stop] * 2]
        )
    return bytes(data)


def outcome(path: Path) -> str:
    """ "valid", or the message; any exception but RecipeError fails the test that asks."""
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        return str(error)
    assert parse_recipe(dump(recipe)) == recipe
    assert recipe.digest
    return "valid"


@each_recipe
def test_damaged_trees_are_refused_with_the_place_or_valid(path: Path, tmp_path: Path) -> None:
    tree, draw, target = asdict(load_recipe(path)), random.Random(17), tmp_path / "r.yaml"
    outcomes = []
    for _ in range(TRIALS):
        target.write_text(damaged(tree, draw), encoding="utf-8")
        outcomes.append(outcome(target))
    refusals = [message for message in outcomes if message != "valid"]
    assert len(refusals) >= TRIALS / 2
    assert [message for message in refusals if not re.match(re.escape(str(target)) + r":\d+: ", message) or len(message) > 600] == []


@each_recipe
def test_scribbled_files_are_refused_with_the_name_or_valid(path: Path, tmp_path: Path) -> None:
    text, draw, target = path.read_text(encoding="utf-8"), random.Random(17), tmp_path / path.name
    for other in RECIPES:
        (tmp_path / other.name).write_bytes(other.read_bytes())
    outcomes = []
    for _ in range(TRIALS):
        target.write_bytes(scribbled(text, draw))
        outcomes.append(outcome(target))
    refusals = [message for message in outcomes if message != "valid"]
    assert len(refusals) >= TRIALS / 4
    assert [message for message in refusals if not message.startswith(str(tmp_path))] == []
