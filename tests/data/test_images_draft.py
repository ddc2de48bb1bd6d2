"""JPEG pictures decoded below their size: how little that changes, where it is done, and that nothing else differs."""

from __future__ import annotations

import io
import random
import re

import numpy as np
import pytest
from PIL import Image

from tests.data.test_images import BLUE, RED, UNDO, encode, mutate, photo, seeds
from tests.sights import SIGHTS
from vlm2vec.data.images import SPARE, Limits, Needed, load_image
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import ImageError

# Mean and 99.9th percentile of |draft - exact| in levels of 255, after the resize to what is needed, where SPARE is only just kept:
# the figures of docs/pictures.md, and the most over the scales.
TOLERANCE = {"photo": (1.2, 6), "text": (3.5, 28), "noise": (3.1, 13)}


def size_of(width: int, height: int) -> Needed:
    """What always needs one size."""
    return lambda *_: (width, height)


def load(data: bytes, needed: Needed | None = None, limits: Limits | None = None) -> Image.Image:
    return load_image(ImageRef(data, "row 7"), limits or Limits(), needed)


def striped(width: int, height: int, **options: object) -> bytes:
    """Four broad bars of different colours: up, down, left and right differ."""
    image = Image.new("RGB", (width, height), "white")
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(BLUE, (width // 2, 0, width, height // 4))
    return encode(image, "JPEG", quality=95, **options)


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("kind", SIGHTS)
def test_the_change_stays_within_the_tolerance(kind: str, scale: int) -> None:
    target = (1536 // scale // SPARE, 1024 // scale // SPARE)
    data = encode(SIGHTS[kind](1536, 1024), "JPEG", quality=90)
    reduced = load(data, size_of(*target))
    assert reduced.size == (1536 // scale, 1024 // scale)
    change = difference(*(image.resize(target, Image.Resampling.BICUBIC) for image in (reduced, load(data))))
    mean, most = TOLERANCE[kind]
    assert 0 < change.mean() <= mean and np.quantile(change, 0.999) <= most, (change.mean(), np.quantile(change, 0.999))


@pytest.mark.parametrize(
    ("size", "target", "found"),
    [
        ((1600, 1200), (100, 75), (200, 150)),
        ((1600, 1200), (101, 75), (400, 300)),  # an eighth would not be twice the width
        ((1600, 1200), (100, 76), (400, 300)),
        ((1600, 1200), (201, 1), (800, 600)),
        ((1600, 1200), (400, 300), (800, 600)),
        ((1600, 1200), (401, 300), (1600, 1200)),
        ((1596, 1200), (50, 50), (399, 300)),  # 8 does not divide the width
        ((1598, 1200), (50, 50), (799, 600)),
        ((1599, 1200), (50, 50), (1599, 1200)),
        ((1600, 1201), (50, 50), (1600, 1201)),
    ],
)
def test_the_smallest_scale_is_taken_that_divides_the_sides_and_keeps_twice_what_is_needed(
    size: tuple[int, int], target: tuple[int, int], found: tuple[int, int]
) -> None:
    assert load(striped(*size), size_of(*target)).size == found


def test_a_scale_that_changes_what_is_needed_is_not_taken() -> None:
    def more_for_small_ones(width: int, height: int) -> tuple[int, int]:
        return (50, 50) if width >= 400 else (60, 60)

    assert load(striped(1600, 1200), more_for_small_ones).size == (400, 300)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_and_open_images_are_as_ever(format: str) -> None:
    data = encode(Image.new("RGB", (320, 240), RED), format)
    assert load(data, size_of(10, 10)).size == (320, 240)


def test_the_image_of_a_caller_is_not_touched() -> None:
    opened = Image.open(io.BytesIO(striped(320, 240)))
    assert load_image(ImageRef(opened), needed=size_of(10, 10)).size == opened.size == (320, 240)


@pytest.mark.parametrize("orientation", UNDO)
def test_orientation_is_seen_before_and_kept_after(orientation: int) -> None:
    """What is needed is asked for the upright size; four of the orientations change its sides."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = striped(1600, 800, exif=exif)
    whole, asked = load(data), []

    def needed(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return (100, 50) if width > height else (50, 100)

    reduced = load(data, needed)
    assert asked[0] == whole.size and reduced.size == (whole.width // 8, whole.height // 8)
    assert difference(reduced, whole.resize(reduced.size, Image.Resampling.BOX)).mean() < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg(mode: str, options: dict[str, object]) -> None:
    image = SIGHTS["photo"](640, 480).convert(mode)
    data = encode(image, "JPEG", quality=95, **options)
    reduced, whole = load(data, size_of(40, 30)), load(data)
    assert reduced.mode == "RGB" and reduced.size == (80, 60)
    assert difference(reduced, whole.resize(reduced.size, Image.Resampling.BOX)).mean() < 2


def test_a_file_of_several_pictures() -> None:
    first, second = SIGHTS["photo"](640, 480), Image.new("RGB", (640, 480), RED)
    data = encode(first, "MPO", save_all=True, append_images=[second])
    reduced, whole = load(data, size_of(40, 30)), load(data)
    assert reduced.size == (80, 60) and difference(reduced, whole.resize(reduced.size, Image.Resampling.BOX)).mean() < 2


def refusal(data: bytes, needed: Needed | None, limits: Limits | None = None) -> str:
    """The message with its counts of bytes left out, or "" for a picture that is read."""
    try:
        load(data, needed, limits)
    except ImageError as error:
        return re.sub(r"\d+", "N", str(error))
    return ""


@pytest.mark.parametrize("limits", [Limits(pixels=1000), Limits(aspect=1.1), Limits(bytes=100)], ids=str)
def test_limits_are_those_of_the_whole_picture(limits: Limits) -> None:
    data = striped(320, 240)
    assert refusal(data, size_of(1, 1), limits) == refusal(data, None, limits) != ""


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused_alike(share: float, progressive: bool) -> None:
    data = encode(SIGHTS["photo"](640, 480), "JPEG", progressive=progressive)
    cut = data[: int(share * len(data))]
    assert refusal(cut, size_of(10, 10)) == refusal(cut, None) != ""


@pytest.mark.filterwarnings("ignore")
def test_300_mutated_files_are_read_or_refused_as_at_full_size() -> None:
    chance, refused = random.Random(3), 0
    sound = [photo("JPEG"), striped(64, 32), striped(64, 64, progressive=True), *(data for data in seeds() if data[:2] == b"\xff\xd8")]
    for trial in range(300):
        data = mutate(sound[trial % len(sound)], chance)
        assert refusal(data, size_of(1, 1)) == refusal(data, None)
        refused += refusal(data, None) != ""
    assert 30 < refused < 290
