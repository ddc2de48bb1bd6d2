"""The pass that fills the feature cache, and runs that read from it: the same training, on disk once, however often it is killed."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.faults.common import FAULT, changed, exit_code, forked_run, killed_at_save, light_recipe
from tests.ranks import fork_ranks
from tests.runs import final_bytes, start_run
from tests.sights import SIGHTS
from vlm2vec import precompute as module
from vlm2vec.backbones import load_backbone
from vlm2vec.batch import featurize
from vlm2vec.config import ModelConfig, Recipe
from vlm2vec.data.bad import FILE
from vlm2vec.data.images import content_key
from vlm2vec.data.types import ImageRef, Item, Pair
from vlm2vec.errors import RecipeError
from vlm2vec.feature_cache import FeatureCache
from vlm2vec.io import read_jsonl
from vlm2vec.precompute import GIB, by_use, precompute
from vlm2vec.schema import SourceConfig
from vlm2vec.trainer import LOG, load_encoder, mixture_of, total_steps

ROWS, STEPS = 20, 6  # steps of 8 pairs: 2.4 epochs
PICTURES = 13
ROOMY, TIGHT = 1.0, 14_000 / GIB  # GiB: room for all pictures, and for some


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


def write(root: Path) -> Path:
    """Rows with one picture, two or none; pictures of three sizes, the first eight of them in two rows each."""
    (root / "one").mkdir(parents=True)
    for number in range(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((56, (28, 56, 84)[number % 3])).save(root / f"{number}.png")
    pq.write_table(pa.Table.from_pylist([row(index) for index in range(ROWS)]), root / "one" / "original.parquet")
    return root


def row(index: int) -> dict[str, str]:
    shown, answer = index % 8 if index < 16 else None, 8 + index % 5 if index % 4 == 0 else None
    return {
        "qry": f"{'' if shown is None else '<|image_1|>'}\nName number {index}\n",
        "qry_image_path": "" if shown is None else f"{shown}.png",
        "pos_text": f"{'' if answer is None else '<|image_1|>'}\nanswer {index}",
        "pos_image_path": "" if answer is None else f"{answer}.png",
        "neg_text": "", "neg_image_path": "",
    }  # fmt: skip


def recipe_for(root: Path, run_dir: Path, room: float = ROOMY, steps: int = STEPS, **data: Any) -> Recipe:
    options = {"root": str(root), "sources": (SourceConfig(name="one"),), "block": 0, "feature_cache": room} | data
    return light_recipe(run_dir, steps=steps, every=2, **options)


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    return read_jsonl(run_dir / LOG)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.*"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)


def pass_over(recipe: Recipe) -> FeatureCache:
    mixture = mixture_of(recipe)
    cache = precompute(recipe, load_encoder(recipe, None), mixture, total_steps(recipe, mixture))
    assert cache is not None
    return cache


# -- which pictures


class Rows(list):
    def id(self, index: int) -> str:
        return f"s:{index}"


class Batches:
    """One source, and the rows of each batch."""

    def __init__(self, pairs: Sequence[Pair], batches: Sequence[Sequence[int]]) -> None:
        self.sources, self.batches = [Rows(pairs)], batches

    def draws(self, index: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        return np.array([(0, row) for row in self.batches[index]])


def png(shade: int) -> ImageRef:
    return ImageRef(Image.new("RGB", (4, 4), (shade, 0, 0)))


def shows(*shades: int) -> Pair:
    pictures = [ImageRef(Path("missing.png")) if shade < 0 else png(shade) for shade in shades]
    query, positive, *negatives = [Item("x", (picture,)) for picture in pictures]
    return Pair("s:0", "s", query, positive, tuple(negatives))


@pytest.mark.parametrize(("negatives", "expected"), [(True, [3, 1, 2, 9, 4, 5]), (False, [3, 1, 2, 4, 5])])
def test_the_most_used_come_first_then_the_first_used(negatives: bool, expected: list[int]) -> None:
    """Row 0 is drawn three times, row 1 and 2 twice; picture 3 is in rows 0 and 2; -1 cannot be read."""
    pairs = [shows(1, 3), shows(2, -1, 9), shows(4, 3), shows(-1, 5), shows(7, 8)]
    batches = [[0, 1], [0, 2], [0, 1], [2, 3]]
    keys = {content_key(png(shade)): shade for shade in range(10)}
    plan = by_use(len(batches), Batches(pairs, batches), negatives, workers=0)
    assert [keys[seen.key] for seen in plan] == expected


def test_a_recipe_without_a_cache_fills_none(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path, room=0.0)
    assert precompute(recipe, load_encoder(recipe, None), mixture_of(recipe), 1) is None and not list(tmp_path.iterdir())


# -- the bound


def test_as_many_as_there_is_room_for_and_always_the_same(root: Path, tmp_path: Path) -> None:
    roomy, tight = (pass_over(recipe_for(root, tmp_path / name, room)) for name, room in (("roomy", ROOMY), ("tight", TIGHT)))
    plan = [seen.key for seen in by_use(STEPS, mixture_of(recipe_for(root, tmp_path)), True, 0)]
    assert roomy.kept == set(plan) and len(plan) == PICTURES
    assert tight.kept == set(plan[: len(tight.kept)]) and 2 < len(tight.kept) < PICTURES - 2
    assert bytes_in(tight.directory) <= TIGHT * GIB < sum(roomy.sizes[key] for key in plan[: len(tight.kept) + 1])
    assert pass_over(recipe_for(root, tmp_path / "tight", TIGHT)).kept == tight.kept
    shared = recipe_for(root, tmp_path / "other", TIGHT, feature_folder=str(tmp_path / "roomy" / "features"))
    assert pass_over(shared).kept == tight.kept  # however full the folder is already


def test_a_second_pass_encodes_nothing_and_a_damaged_shard_again(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = module.Encoder.picture_features
    monkeypatch.setattr(module.Encoder, "picture_features", lambda self, picture: encoded.append(1) or original(self, picture))
    recipe = recipe_for(root, tmp_path)
    before = pass_over(recipe)
    pass_over(recipe)
    assert len(encoded) == PICTURES
    bad = sorted(before.directory.glob("*.safetensors"))[1]
    bad.write_bytes(bad.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        after = pass_over(recipe)
    assert bad.name in caplog.text and len(encoded) == PICTURES + 4 and after.kept == before.kept
    Image.new("RGB", (28, 28), "white").save(tmp_path / "new.png")
    assert after.known(ImageRef(tmp_path / "new.png")) is None


def test_another_content_of_a_file_is_encoded(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    before = pass_over(recipe_for(root, tmp_path / "run")).kept
    Image.new("RGB", (56, 56), "white").save(root / "3.png")
    after = pass_over(recipe_for(root, tmp_path / "run")).kept
    assert len(after - before) == len(before - after) == 1


def test_two_ranks_keep_what_one_keeps(root: Path, tmp_path: Path) -> None:
    def one(rank: int, folder: str) -> None:
        cache = pass_over(recipe_for(root, tmp_path / folder.format(rank=rank), TIGHT))
        (tmp_path / f"{folder[:2]}-{rank}.json").write_text(json.dumps(sorted(cache.kept)))
        assert all(cache._read(key) for key in cache.kept)

    assert fork_ranks(partial(one, folder="together"), world=2) == [0, 0]
    assert fork_ranks(partial(one, folder="apart-{rank}"), world=2) == [0, 0]  # as on two machines without a common disk
    alone = pass_over(recipe_for(root, tmp_path / "alone", TIGHT))
    assert {(tmp_path / f"{how}-{rank}.json").read_text() for how in ("to", "ap") for rank in (0, 1)} == {json.dumps(sorted(alone.kept))}
    assert bytes_in(tmp_path / "together" / "features") <= TIGHT * GIB


# -- runs


def undisturbed(recipe: Recipe) -> dict[str, bytes]:
    assert exit_code(forked_run(recipe)) == 0
    return final_bytes(Path(recipe.run.dir))


@pytest.fixture(scope="module")
def runs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs without a cache, with all pictures in it and with some."""
    here = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "BLOCK", 4)
    for name, room in (("off", 0.0), ("all", ROOMY), ("some", TIGHT)):
        undisturbed(recipe_for(root, here / name, room))
    patch.undo()
    return {path.name: path for path in here.iterdir()}


@pytest.mark.parametrize("name", ["all", "some"])
def test_a_run_is_that_without_a_cache_up_to_rounding(runs: dict[str, Path], name: str) -> None:
    """Pictures went through the tower alone rather than with those of their chunk, so that sums were rounded in another order."""
    for found, expected in zip(rows_of(runs[name]), rows_of(runs["off"]), strict=True):
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-4)
    assert (runs[name] / LOG).read_bytes() != (runs["off"] / LOG).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_with_all_pictures_cached_nothing_is_decoded_and_no_tower_runs(
    root: Path, tmp_path: Path, runs: dict[str, Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that another run filled; with workers or without, the log is the same bytes."""

    def must_not_run(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("ran")

    monkeypatch.setattr("vlm2vec.batch.load_image", must_not_run)

    def without_towers(recipe: Recipe, resumed: Path | None) -> Any:
        encoder = load_encoder(recipe, resumed)
        for tower in encoder.backbone.towers():
            tower.register_forward_pre_hook(must_not_run)
        return encoder

    monkeypatch.setattr("vlm2vec.trainer.load_encoder", without_towers)
    start_run(recipe_for(root, tmp_path, feature_folder=str(runs["all"] / "features"), workers=workers))
    assert final_bytes(tmp_path) == final_bytes(runs["all"])


def test_the_pass_decodes_as_the_run_does() -> None:
    """Smaller, under `model.decode: draft`; its folder is then another one (`Processor.fingerprint`)."""
    picture = io.BytesIO()
    SIGHTS["photo"](1024, 768).save(picture, "JPEG")
    item = Item(images=(ImageRef(picture.getvalue()),))
    mixture: Any = SimpleNamespace(sources=[[Pair("s:0", "s", item, Item("a"))]])
    made = {}
    for decode in ("exact", "draft"):
        processor = load_backbone(ModelConfig(path="builtin/tiny-qwen2_vl", decode=decode)).processor  # type: ignore[arg-type]
        made[decode] = module._Inputs([module.Seen("key", 0, 0, 0)], mixture, True, processor)[0]["pixel_values"]
        assert torch.equal(made[decode], featurize(processor, item).images[0]["pixel_values"])
    assert not torch.equal(made["exact"], made["draft"])


def killed_in_the_pass(recipe: Recipe) -> None:
    """The third shard is written but for its list."""
    assert exit_code(forked_run(recipe, lambda: os.environ.update({FAULT: "before-rename:6:kill"}))) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["all", "some"])
def test_killed_in_the_pass_and_in_training_it_ends_with_the_same_bits(
    root: Path, tmp_path: Path, runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)  # as many pictures in other shards: no bit depends on them
    recipe = recipe_for(root, tmp_path, ROOMY if name == "all" else TIGHT)
    killed_in_the_pass(recipe)
    assert len(list(tmp_path.rglob("features/*/*.json"))) == 2 and not (tmp_path / LOG).exists()
    killed_at_save(recipe, number=2)
    assert len(rows_of(tmp_path)) >= 4 and exit_code(forked_run(recipe)) == 0
    assert final_bytes(tmp_path) == final_bytes(runs[name])


def test_bad_pictures_are_replaced_as_without_a_cache(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    (root / "2.png").write_bytes((root / "2.png").read_bytes()[:60])
    (root / "9.png").unlink()
    for name, room in (("off", 0.0), ("on", ROOMY)):
        undisturbed(recipe_for(root, tmp_path / name, room, steps=3, bad_pictures="skip", max_bad_fraction=0.5))
    assert (tmp_path / "on" / FILE).read_bytes() == (tmp_path / "off" / FILE).read_bytes() != b""


def test_a_bad_picture_stops_a_run_as_without_a_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    (root / "2.png").write_bytes(b"<html>404</html>")
    said = []
    for name, room in (("off", 0.0), ("on", ROOMY)):
        assert exit_code(forked_run(recipe_for(root, tmp_path / name, room))) != 0
        said.append([line for line in capfd.readouterr().err.splitlines() if line.startswith("ImageError")])
    assert said[0] == said[1] and "data.bad_pictures=skip" in said[0][0]


# -- refusals


@pytest.mark.parametrize("section", ["model.train", "lora.parts"])
@pytest.mark.parametrize("part", ["vision", "projector"])
def test_trained_towers_are_refused(root: Path, tmp_path: Path, section: str, part: str) -> None:
    recipe = recipe_for(root, tmp_path)
    trained: Callable[[], Recipe] = {
        "model.train": lambda: changed(recipe, "model", train=(part,)),
        "lora.parts": lambda: changed(recipe, "lora", parts=("language", part)),
    }[section]
    with pytest.raises(RecipeError, match=f"data.feature_cache needs frozen vision and projector, and this recipe trains {part}"):
        trained().validate()
    replace(trained(), data=replace(recipe.data, feature_cache=0.0)).validate()


def test_a_model_that_takes_no_features_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(root, tmp_path)
    encoder = load_encoder(recipe, None)
    monkeypatch.setattr(type(encoder.backbone), "takes_features", False)
    with pytest.raises(RecipeError, match="data.feature_cache: a qwen2_vl model takes pixels only"):
        precompute(recipe, encoder, mixture_of(recipe), 1)


def test_the_folder_is_no_part_of_a_recipe_and_the_bound_is(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path)
    assert changed(recipe, "data", feature_folder="elsewhere").digest == recipe.digest != changed(recipe, "data", feature_cache=0.0).digest


def test_towers_are_in_evaluation_mode_and_the_rest_gets_its_mode_back(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path)
    encoder = load_encoder(recipe, None)
    encoder.model.train()
    modes: set[bool] = set()
    encoder.backbone.towers()[0].register_forward_pre_hook(lambda tower, arguments: modes.add(tower.training))
    precompute(recipe, encoder, mixture_of(recipe), 1)
    assert modes == {False} and all(part.training for part in encoder.model.modules())
    assert torch.is_grad_enabled()
