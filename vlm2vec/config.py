"""From a YAML file to a checked `Recipe` and back: inheritance, overrides, the tiny form, the dump.

Every error is a RecipeError that names the file, the line and the key, and is raised before any model or data is touched.
The sections and their keys are in `schema`, the strict reading of YAML in `strict_yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlm2vec import strict_yaml
from vlm2vec.errors import RecipeError
from vlm2vec.schema import (
    RESOLUTIONS,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    TrainConfig,
    reference,
    violations,
)
from vlm2vec.strict_yaml import Node, build, dump_plain, join

__all__ = [
    "RESOLUTIONS",
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "Recipe",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    "differences",
    "dump",
    "load_recipe",
    "model_options",
    "parse_recipe",
    "reference",
    "shrink",
]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), tiny: bool = False) -> Recipe:
    """The checked recipe in `path`, on top of its `base:`; `overrides` such as "train.lr=1e-4" win over the file.

    `tiny` shrinks every size so that the same code paths run in seconds on a CPU; overrides win over that too.
    """
    path = Path(path)
    given = [_override(text) for text in overrides]
    recipe = _assemble(_layer(_read(path), given), default_dir=f"runs/{path.stem}")
    if not tiny:
        return recipe
    small = strict_yaml.parse(dump(shrink(recipe)).encode(), f"tiny form of {path}", lines=False)
    return _assemble(_layer(small, given))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """The checked recipe in `text`, as `dump` wrote it; no `base:`. `name` is what errors call the text."""
    return _assemble(strict_yaml.parse(text.encode("utf-8", "surrogateescape"), name))


def model_options(given: Sequence[str]) -> dict[str, Any]:
    """The values of texts such as "positions=flat", keys of the `model` section, typed and checked as in a recipe."""
    tree = _layer(Node({"path": Node("model", "")}, ""), [_override(text) for text in given])
    section = build(ModelConfig, tree)
    for key, problem in violations(section):
        raise RecipeError(f"{_locate(tree, key)}: {key} {problem}")
    return {name: getattr(section, name) for name in tree.value if name != "path"}


def check_model(values: Mapping[str, Any], name: str) -> None:
    """RecipeError unless `values`, read from a file called `name`, could stand in the `model` section of a recipe."""
    section = build(ModelConfig, strict_yaml.parse(dump_plain({"path": "model", **values}).encode(), name, lines=False))
    for key, problem in violations(section):
        raise RecipeError(f"{name}: {key} {problem}")


def dump(recipe: Recipe) -> str:
    """YAML of the resolved recipe: `parse_recipe(dump(recipe)) == recipe`."""
    return dump_plain(asdict(recipe))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys that make two digests differ, as "train.lr: 0.0001 -> 0.0002"."""
    return list(_differences(old.identity(), new.identity(), ""))


def _differences(old: Any, new: Any, key: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old:  # both hold every key of their section
            yield from _differences(old[name], new[name], join(key, name))
    elif old != new:
        yield f"{key}: {_show(old)} -> {_show(new)}"


def _show(value: Any) -> str:
    return strict_yaml.shorten(dump_plain(value, flow=True).strip(), quote=False)


def _read(path: Path, where: str = "", depth: int = 0) -> Node:
    """The tree in `path`, merged over its `base:`; `where` is the line that named this file and `depth` how many files led here."""
    if depth > strict_yaml.MAX_DEPTH:
        raise RecipeError(f"{where}base files form a circle or a chain of more than {strict_yaml.MAX_DEPTH}: {path}")
    tree = strict_yaml.parse(_read_bytes(path, where), str(path))
    if tree.value is None:
        raise RecipeError(f"{path}: recipe is empty")
    base = tree.value.pop("base", None) if isinstance(tree.value, dict) else None
    if base is None:
        return tree
    if not isinstance(base.value, str):
        raise RecipeError(f"{base.where}: base: expected the path of a recipe, got {strict_yaml.show(base)}")
    return _merge(_read(path.parent / base.value, f"{base.where}: ", depth + 1), tree)


def _read_bytes(path: Path, where: str) -> bytes:
    """The file, or one byte more than a recipe may have."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(strict_yaml.MAX_BYTES + 1)
        problem = "is not a file" if path.exists() else "not found"
        near = strict_yaml.nearest(path.name, [other.name for other in sorted(path.parent.glob("*.yaml"))])
    except OSError as error:
        raise RecipeError(f"{where}{path} cannot be read: {error.strerror}") from None
    raise RecipeError(f"{where}{path} {problem}" + (f"; did you mean {path.parent / near}?" if near else ""))


def _override(text: str) -> Node:
    """The tree that holds one "key=value"."""
    key, equals, value = text.partition("=")
    if not key.strip() or not equals or not value.strip():
        raise RecipeError(f"override must look like key=value, got {strict_yaml.shorten(text)}")
    place = f"override {strict_yaml.shorten(text, quote=False)}"
    node = strict_yaml.parse(value.encode("utf-8", "surrogateescape"), place, lines=False)
    for name in reversed(key.strip().split(".")):
        node = Node({name: node}, place)
    return node


def _layer(tree: Node, layers: Sequence[Node]) -> Node:
    for layer in layers:
        tree = _merge(tree, layer)
    return tree


def _merge(base: Node, child: Node) -> Node:
    """`child` wins key by key where both are mappings, and as a whole elsewhere."""
    if not isinstance(base.value, dict) or not isinstance(child.value, dict):
        return child
    entries = {name: _merge(base.value[name], node) if name in base.value else node for name, node in child.value.items()}
    return Node(base.value | entries, child.where)


def _assemble(tree: Node, default_dir: str = "") -> Recipe:
    """The recipe of a tree, checked; the first violation is reported with the place of its key."""
    recipe = build(Recipe, tree)
    for key, problem in violations(recipe):
        raise RecipeError(f"{_locate(tree, key)}: {key} {problem}")
    return recipe if recipe.run.dir else replace(recipe, run=replace(recipe.run, dir=default_dir))


def _locate(tree: Node, key: str) -> str:
    """The place of the deepest node on the way to `key`, such as data.sources[2].weight."""
    for name in re.findall(r"\w+", key):
        if isinstance(tree.value, list):
            tree = tree.value[int(name)]
        elif isinstance(tree.value, dict) and name in tree.value:
            tree = tree.value[name]
    return tree.where


# ---------------------------------------------------------------------------------------------------------------- the tiny form


def shrink(recipe: Recipe) -> Recipe:
    """The recipe with every size cut down, on a miniature of its model family and made-up rows, and every option kept."""
    return replace(
        recipe,
        run=replace(recipe.run, dir=f"{recipe.run.dir}-tiny", trackers=()),
        model=_shrink_model(recipe.model),
        data=_shrink_data(recipe.data),
        train=_shrink_train(recipe.train),
        checkpoint=replace(recipe.checkpoint, every=3),
        evaluate=_shrink_evaluate(recipe.evaluate),
    )


def _shrink_model(model: ModelConfig) -> ModelConfig:
    if model.family is None:
        raise RecipeError("model.family is needed by the tiny form: name the model type, as in the model's config.json")
    return replace(
        model,
        path=f"builtin/tiny-{model.family}",
        revision=None,
        trust_remote_code=False,
        attention="sdpa" if model.attention == "flash_attention_2" else model.attention,  # a CPU has neither this kernel
        kernels=None,  # nor those
        max_tokens=min(model.max_tokens, 64),
        min_pixels=model.min_pixels and min(model.min_pixels, 56 * 56),
        max_pixels=model.max_pixels and min(model.max_pixels, 112 * 112),
        resize=model.resize and 64,
    )


def _shrink_data(data: DataConfig) -> DataConfig:
    sources = tuple(replace(source, path=None, split="original", cap=source.cap and min(source.cap, 16)) for source in data.sources)
    block = next(size for size in (4, 2, 1, 0) if size <= data.block)  # a divisor of the tiny global batch
    return DataConfig(root="builtin/tiny", sources=sources, block=block, workers=0, feature_cache=data.feature_cache)


def _shrink_train(train: TrainConfig) -> TrainConfig:
    small = replace(train, steps=6, epochs=None, warmup=min(train.warmup, 1), global_batch=8, accumulate=min(train.accumulate, 2))
    small = replace(small, chunk_tokens=train.chunk_tokens and 256, keep_tokens=train.keep_tokens and min(train.keep_tokens, 256))
    return replace(small, compile=False)  # compiling takes minutes


def _shrink_evaluate(evaluate: EvaluateConfig) -> EvaluateConfig:
    suite = evaluate.suite and "builtin/tiny"
    return replace(evaluate, suite=suite, root=None, limit=4, chunk_tokens=256)
