"""The HD transform of Phi-3.5-vision against the published processor: sizes, canvas to the byte, pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm2vec.backbones.phi3_v_image import Phi3VImageProcessor

DATA = Path(__file__).parents[1] / "data" / "phi3v" / "hd"
INDEX = json.loads((DATA / "index.json").read_text("utf-8"))
FAILS_THERE = sorted(name for name, entry in INDEX.items() if "error" in entry)
each_picture = pytest.mark.parametrize("name", sorted(set(INDEX) - set(FAILS_THERE)))


def opened(name: str) -> tuple[Phi3VImageProcessor, Image.Image]:
    return Phi3VImageProcessor(num_crops=INDEX[name]["num_crops"]), Image.open(DATA / INDEX[name]["file"])


@each_picture
def test_the_canvas_is_the_published_one_to_the_byte(name: str) -> None:
    processor, image = opened(name)
    canvas = processor.canvas(image)
    rows, columns = processor.grid(*image.size)
    assert [canvas.height, canvas.width] == [336 * rows, 336 * columns] == INDEX[name]["image_sizes"]
    assert processor.count_tokens(rows, columns) == INDEX[name]["num_img_tokens"]
    assert hashlib.sha256(canvas.tobytes()).hexdigest() == INDEX[name]["hd_rgb_sha256"]


@pytest.mark.parametrize("crops", [1, 4, 16])
def test_pixels_are_the_published_ones(crops: int) -> None:
    samples = np.load(DATA / "pixel_samples.npz")
    names = [name for name in samples.files if name.endswith(f"@{crops}")]
    assert len(names) >= 30
    for name in names:
        processor, image = opened(name)
        made = processor(image)
        assert made["image_sizes"].tolist() == INDEX[name]["image_sizes"]
        torch.testing.assert_close(made["pixel_values"][:, :, 5::42, 5::42], torch.from_numpy(samples[name]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAILS_THERE)
def test_a_strip_that_the_published_processor_refuses_keeps_a_line(name: str) -> None:
    processor, image = opened(name)
    made = processor(image)
    rows, columns = processor.grid(*image.size)
    assert made["pixel_values"].shape == (1 + rows * columns, 3, 336, 336)
    assert made["pixel_values"].isfinite().all()
    white = torch.tensor([(1 - mean) / std for mean, std in zip(processor.image_mean, processor.image_std, strict=True)])
    is_white = (made["pixel_values"][1:] - white[:, None, None]).abs().amax(1) < 1e-6
    assert 0 < int((~is_white).sum()) <= 336 * rows * columns  # one line of pixels, all else is padding


def test_token_counts_are_arithmetic() -> None:
    grid = json.loads((DATA / "size_grid.json").read_text("utf-8"))
    assert grid["columns"] == ["num_crops", "width", "height", "padded_width", "padded_height", "num_img_tokens"]
    for crops, width, height, *expected in grid["rows"]:
        processor = Phi3VImageProcessor(num_crops=crops)
        rows, columns = processor.grid(width, height)
        assert [336 * columns, 336 * rows, processor.count_tokens(rows, columns)] == expected


def test_settings_come_back_and_foreign_keys_do_not(tmp_path: Path) -> None:
    there = {"auto_map": {"AutoProcessor": "code.Class"}, "processor_class": "Other", "num_crops": 16, "image_mean": [0.1, 0.2, 0.3]}
    Phi3VImageProcessor(**there).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8")) == {
        "do_convert_rgb": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_processor_type": "Phi3VImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "num_crops": 16,
        "num_img_tokens": 144,
    }
    assert Phi3VImageProcessor.from_pretrained(tmp_path).num_crops == 16
