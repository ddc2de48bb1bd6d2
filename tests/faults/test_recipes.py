"""Two hundred spoiled recipes and forty traps of YAML: each is refused by file and line, before anything is loaded."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm2vec.config import load_recipe
from vlm2vec.errors import RecipeError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
KEY = re.compile(r"^(?P<indent> *(?:- )?)(?P<key>[a-z_]+):(?P<value>.*)$")
NUMBER = re.compile(r"^ -?[\d.]+(e-?\d+)?\s*(#.*)?$")
NONSENSE = ("[1, [2]]", "{x: {y: 1}}", "!!python/name:os.system", "&a 1", "*a", '"', "\t1", "? 1", "@x", "%x", "[", "{", "- 1", "'")
NO_NUMBER = (".nan", ".inf", "-.inf", '"8"', "1_0x", "0x1g", "1e999", "true", "no", "-17", "2026-01-01", "[]", "9" * 400)


def spoil(text: str, chance: random.Random) -> str:
    """Change one line so that no reading of it is right: an unknown key, nonsense, no number where one is due, or a key twice."""
    lines = text.splitlines()
    keys = [number for number, line in enumerate(lines) if (found := KEY.match(line)) and found["key"] not in ("base", "x")]
    numbers = [number for number in keys if NUMBER.match(KEY.match(lines[number])["value"])]  # type: ignore[index]
    kind = chance.choice(["rename", "nonsense", "number", "twice", "indent"])
    at = chance.choice(numbers if kind == "number" and numbers else keys)
    found = KEY.match(lines[at])
    assert found is not None
    head = f"{found['indent']}{found['key']}:"
    if kind == "rename":
        lines[at] = lines[at].replace(found["key"], found["key"] + "_x", 1)
    elif kind == "twice":
        lines.insert(at + 1, lines[at].replace("- ", "  ", 1))
    elif kind == "indent":
        lines[at] = "\t" + lines[at]
    elif kind == "number" and numbers:
        lines[at] = f"{head} {chance.choice(NO_NUMBER)}"
    else:
        lines[at] = f"{head} {chance.choice(NONSENSE)}"
    return "\n".join(lines) + "\n"


def beside(recipe: Path, text: str, folder: Path) -> Path:
    """The spoiled text where its `base:` is found."""
    for other in RECIPES:
        (folder / other.name).write_text(other.read_text())
    (folder / recipe.name).write_text(text)
    return folder / recipe.name


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.faults)])
def test_spoiled_recipes(count: int, tmp_path: Path, trials: Callable, tally: Callable[..., None]) -> None:
    def trial(chance: random.Random) -> None:
        recipe = chance.choice(RECIPES)
        file = beside(recipe, spoil(recipe.read_text(), chance), tmp_path)
        began = time.process_time()
        with pytest.raises(RecipeError, match=rf"{tmp_path}/\w+\.yaml(:\d+)?: ") as caught:
            load_recipe(file)
        assert time.process_time() - began < 1 and len(str(caught.value)) < 1000

    trials(count, trial)
    came_out = "RecipeError with the file, mostly the line, in under a second"
    tally("F11", "shipped recipes with one line spoiled", came_out, count if count == 200 else 0)


TAIL = """model: {path: builtin/tiny-qwen2_vl}
lora: {rank: 4}
data: {root: x, sources: [{name: a}]}
train: {steps: 9, global_batch: 8, lr: 1}
"""
TRAPS = [
    "!!python/object/apply:os.system ['touch canary']", "!!python/object/new:os.system [touch]", "!!python/name:os.system",
    "!!python/module:os", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!timestamp 2026-01-01", "!include /etc/passwd", "!env HOME",
    "&a [*a]", "&a {b: *a}", "*nowhere", "<<: {steps: 1}", "? [complex, key] : 1", "{a: 1, a: 2}", "[" * 30, "{" * 30,
    "{a: " * 25 + "1" + "}" * 25, "'open", '"open', "\x00", "\x07", "\x1b[31m", "\u2028x: 1", "'\\ud800'", '"\\ud800"', "|\n  text",
    ">\n  text", "%YAML 9.9", "%TAG ! tag:x,2000:", "@reserved", "`reserved`", "0o777", "0b1", "1:30:45", "~", "=", "[1, 2", "- - - 1",
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS, ids=range(len(TRAPS)))
def test_traps_of_yaml(trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable[..., None]) -> None:
    """As a value of a section and as a document: neither is a recipe, and nothing is executed."""
    monkeypatch.chdir(tmp_path)
    for text in (f"{TAIL}loss: {trap}\n", f"{trap}\n", f"loss:\n  temperature: {trap}\n{TAIL}"):
        (tmp_path / "r.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(RecipeError, match="r.yaml"):
            load_recipe(tmp_path / "r.yaml")
    assert not (tmp_path / "canary").exists()
    tally("F11", "traps of YAML, in three places each", "RecipeError; nothing executed", 3)
