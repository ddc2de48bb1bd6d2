"""Batches on the way to the loop: the same whatever the workers and ranks, errors in one line, and the sample at which a worker died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.runs import tiny_recipe
from vlm2vec import batch, feed, io
from vlm2vec.backbones import load_backbone
from vlm2vec.batch import Batch
from vlm2vec.config import Recipe
from vlm2vec.data.bad import FILE
from vlm2vec.data.tiny import write_tiny
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import DataError, EnvError, ImageError
from vlm2vec.trainer import mixture_of

STEPS = 4


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A training folder of which two pictures are damaged."""
    write_tiny(tmp_path, ["image_to_text", "text_to_image", "composed"])
    (tmp_path / "train/images/tiny/Train/red circle_0.png").write_bytes(b"<html>gone</html>")
    (tmp_path / "train/images/tiny/Train/blue cross_1.png").unlink()
    return tmp_path / "train"


def recipe_for(root: Path, run_dir: Path, **data: Any) -> Recipe:
    recipe = tiny_recipe(run_dir, steps=STEPS)
    return replace(recipe, data=replace(recipe.data, root=str(root), **data))


def read(recipe: Recipe, start: int = 0) -> list[tuple[int, list[Batch]]]:
    processor = load_backbone(recipe.model).processor
    Path(recipe.run.dir).mkdir(exist_ok=True)
    return list(feed.read_steps(recipe, mixture_of(recipe), processor, start, STEPS))


def skipping(root: Path, run_dir: Path, **data: Any) -> Recipe:
    return recipe_for(root, run_dir, bad_pictures="skip", max_bad_fraction=0.2, **data)


def test_workers_and_the_step_to_start_from_change_nothing(damaged: Path, tmp_path: Path) -> None:
    alone = read(skipping(damaged, tmp_path / "a"))
    assert [step for step, _ in alone] == list(range(STEPS))
    assert [batches[0].pair_ids for _, batches in read(skipping(damaged, tmp_path / "b", workers=2))] == [
        batches[0].pair_ids for _, batches in alone
    ]
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert [batches[0].pair_ids for _, batches in read(skipping(damaged, tmp_path / "c"), start=2)] == [
        batches[0].pair_ids for _, batches in alone[2:]
    ]


def test_ranks_replace_and_list_the_same_as_one(damaged: Path, tmp_path: Path, ranks: Callable) -> None:
    alone = [batches[0].pair_ids for _, batches in read(skipping(damaged, tmp_path / "one"))]

    def member(rank: int) -> None:
        found = [batches[0].pair_ids for _, batches in read(skipping(damaged, tmp_path / "two"))]
        assert found == [ids[rank * 6 : rank * 6 + 6] for ids in alone]

    (tmp_path / "two").mkdir()
    ranks(member)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()


def test_the_budget_ends_every_rank_with_the_same_table(damaged: Path, tmp_path: Path, ranks: Callable) -> None:
    recipe = recipe_for(damaged, tmp_path / "run", bad_pictures="skip", max_bad_fraction=0.02)  # 1 of 72 pairs

    def member(rank: int) -> None:
        with pytest.raises(DataError, match=r"2 pairs, listed in .*\n       1  no") as caught:
            read(recipe)
        (tmp_path / f"said-{rank}").write_text(str(caught.value))

    (tmp_path / "run").mkdir()
    ranks(member)
    assert (tmp_path / "said-0").read_text() == (tmp_path / "said-1").read_text()
    assert len(io.read_jsonl(tmp_path / "run" / FILE)) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_stops_with_one_line_from_a_worker_too(damaged: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(ImageError, match=r"^\w+ row \d+: image '[^']*': [^\n]*data.bad_pictures=skip$"):
        read(recipe_for(damaged, tmp_path / "run", workers=workers))


def test_a_folder_without_pictures_ends_soon_and_says_how_they_failed(damaged: Path, tmp_path: Path) -> None:
    for picture in (damaged / "images/tiny/Train").iterdir():
        picture.unlink()
    with pytest.raises(DataError, match=r"15 pairs in a row from \w+:\d+ on have pictures .*\n +15  no such file$"):
        read(skipping(damaged, tmp_path / "run"))


def test_a_dead_worker_names_its_sample(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the system kills it for its memory, or a decoder crashes; the handler of SIGCHLD is as it was."""
    original, victim = batch.load_image, "yellow square_1.png"

    def deadly(image: ImageRef, **options: Any) -> Image.Image:
        if victim in image.label:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(image, **options)

    monkeypatch.setattr(batch, "load_image", deadly)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds between looks at late workers; usually 5
    before = signal.getsignal(signal.SIGCHLD)
    said = r"^a loader worker died while it was at (\w+):(\d+), \1 row \2: image 'images/tiny/Train/yellow square_1.png': "
    with pytest.raises(EnvError, match=said):
        read(skipping(damaged, tmp_path / "run", workers=2))
    assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.parametrize("workers", [0, 2])
def test_with_workers_the_main_process_decodes_nothing(
    workers: int, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, here = batch.load_image, []
    monkeypatch.setattr(batch, "load_image", lambda image, **options: here.append(1) or original(image, **options))
    read(skipping(damaged, tmp_path / "run", workers=workers))
    assert bool(here) == (workers == 0)


def test_other_errors_of_a_worker_stay_what_they_are(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "load_image", lambda image, **options: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        read(skipping(damaged, tmp_path / "run", workers=1))
