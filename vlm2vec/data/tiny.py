"""A made-up benchmark in the layout of MMEB: coloured shapes, to train and evaluate on in seconds. Recipes reach it by `--tiny`.

    <to>/train/<SOURCE>/original-00000-of-00001.parquet    pictures: <to>/train/images/tiny/Train
    <to>/eval/<SET>/test-00000-of-00001.parquet            pictures: <to>/eval_images/tiny
    <to>/datasets.yaml                                     the suite: one set per meta-task

The answers can be seen in the pictures, and the pictures of the evaluation are not those of the training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from vlm2vec import io
from vlm2vec.data.sampler import permutation, random_words
from vlm2vec.errors import DataError
from vlm2vec.strict_yaml import dump_plain

TINY_ROOT = "builtin/tiny"
ROWS = 24
VERSION = 1  # part of the name in the cache: raise it whenever the rows or pictures change

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 80),
    "blue": (38, 84, 200),
    "yellow": (244, 200, 40),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
WORDS = {"circle": "a round thing", "square": "a thing with four sides", "triangle": "a thing with three corners", "cross": "a plus sign"}

LOOK = "<|image_1|>\nRepresent the given image\n"
Row = dict[str, str]
Query = tuple[str, str, tuple[str, str]]  # text, picture, (text, picture) of the gold


@dataclass(frozen=True)
class Thing:
    """A coloured shape; each `look` is another picture of it. Looks 0 and 1 are for training, 2 and 3 for evaluation."""

    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def file(self, look: int) -> str:
        """Name of its picture, with a space as some of MMEB's have."""
        return f"{self.name}_{look}.png"

    def draw(self, look: int) -> Image.Image:
        """32 to 63 pixels each way; place, size and background depend on the look."""
        words = [int(word % 2**20) for word in random_words(6, "tiny picture", self.name, look)]
        width, height = 32 + words[0] % 32, 32 + words[1] % 32
        picture = Image.new("RGB", (width, height), (225 + words[2] % 31,) * 3)
        size = min(width, height) * (50 + words[3] % 40) // 100
        left, top = words[4] % (width - size), words[5] % (height - size)
        _draw_shape(ImageDraw.Draw(picture), self.shape, left, top, size, COLOURS[self.colour])
        return picture


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, left: int, top: int, size: int, colour: tuple[int, int, int]) -> None:
    right, bottom, third = left + size, top + size, size // 3
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    else:
        draw.rectangle((left + third, top, right - third, bottom), fill=colour)
        draw.rectangle((left, top + third, right, bottom - third), fill=colour)


ALL = tuple(Thing(colour, shape) for colour, shape in itertools.product(COLOURS, SHAPES))


def _cycle(*key: object) -> Iterator[Thing]:
    """All things in an order of their own, again and again."""
    return itertools.cycle(ALL[index] for index in permutation(len(ALL), "tiny", *key).tolist())


# -- training ----------------------------------------------------------------------------------------------------------------------------


def _row(query: str, query_image: str, positive: str, positive_image: str, negative_image: str = "") -> Row:
    row = {"qry": query, "pos_text": positive, "neg_text": ""}
    pictures = {"qry_image_path": query_image, "pos_image_path": positive_image, "neg_image_path": negative_image}
    return row | {column: name and f"images/tiny/Train/{name}" for column, name in pictures.items()}


def _image_to_text(thing: Thing) -> Row:
    return _row("<|image_1|>\nName the shape and its colour\n", thing.file(0), thing.name, "")


def _text_to_image(thing: Thing) -> Row:
    # the placeholder without a picture is a trap that real rows of WebQA hold
    return _row(f"<|image_1|>\nFind a picture of this: {thing.name}\n", "", LOOK, thing.file(1))


def _edit_to_image(thing: Thing) -> Row:
    """The negative is the query's own thing in its other look, a picture without words as in VisDial."""
    colours = list(COLOURS)
    wanted = Thing(colours[(colours.index(thing.colour) + 1) % len(colours)], thing.shape)
    query = f"<|image_1|>\nFind the same shape in another colour: {wanted.colour}\n"
    return _row(query, thing.file(0), LOOK, wanted.file(1), thing.file(1))


def _text_to_text(thing: Thing) -> Row:
    return _row(f"Find the name of what is described: {WORDS[thing.shape]}, coloured {thing.colour}\n", "", thing.name, "")


def _image_to_image(thing: Thing) -> Row:
    return _row("<|image_1|>\nFind another picture of the same thing\n", thing.file(0), LOOK, thing.file(1))


KINDS: tuple[Callable[[Thing], Row], ...] = (_image_to_text, _text_to_image, _edit_to_image, _text_to_text, _image_to_image)


# -- evaluation --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    """An evaluation set: `row` gives the query's text and picture, and the gold; `candidates` are all that occur as gold."""

    meta_task: str
    query_modality: str
    target_modality: str
    row: Callable[[Thing], Query]
    candidates: tuple[tuple[str, str], ...]


def _picture(thing: Thing) -> tuple[str, str]:
    return LOOK, f"tiny/{thing.file(3)}"


def _name_it(thing: Thing) -> Query:
    return "<|image_1|>\nName the shape and its colour\n", f"tiny/{thing.file(2)}", (thing.name, "")


def _ask_its_colour(thing: Thing) -> Query:
    return f"<|image_1|>\nAnswer the question: what colour is the {thing.shape}?\n", f"tiny/{thing.file(2)}", (thing.colour, "")


def _search_it(thing: Thing) -> Query:
    return f"Find a picture of this: {thing.name}\n", "", _picture(thing)


def _point_at_it(thing: Thing) -> Query:
    text = f"<|image_1|>\nSelect the part of the image that shows the {thing.name}\n"
    return text, f"tiny/{_scene_file(thing)}", _picture(thing)


EVAL_SETS = {
    "TinyShapes": _Set("classification", "I", "T", _name_it, tuple((thing.name, "") for thing in ALL)),
    "TinyColours": _Set("vqa", "I+T", "T", _ask_its_colour, tuple((colour, "") for colour in COLOURS)),
    "TinySearch": _Set("retrieval", "T", "I", _search_it, tuple(_picture(thing) for thing in ALL)),
    "TinyScenes": _Set("grounding", "I+T", "I", _point_at_it, tuple(_picture(thing) for thing in ALL)),
}


def _eval_rows(name: str, rows: int) -> dict[str, list[str] | list[list[str]]]:
    spec = EVAL_SETS[name]
    texts, images, golds = zip(*(spec.row(thing) for thing in itertools.islice(_cycle(name), rows)), strict=True)
    lists = [[gold, *(candidate for candidate in spec.candidates if candidate != gold)] for gold in golds]
    return {
        "qry_text": list(texts),
        "qry_img_path": list(images),
        "tgt_text": [[text for text, _ in candidates] for candidates in lists],
        "tgt_img_path": [[image for _, image in candidates] for candidates in lists],
    }


def _scene_file(thing: Thing) -> str:
    return f"scene {thing.name}.png"


def _scene(thing: Thing) -> Image.Image:
    """The thing beside the one after it."""
    pictures = [thing.draw(2), ALL[(ALL.index(thing) + 1) % len(ALL)].draw(2)]
    scene = Image.new("RGB", (128, 64), (240, 240, 240))
    for index, picture in enumerate(pictures):
        scene.paste(picture, (64 * index, 0))
    return scene


# -- writing -----------------------------------------------------------------------------------------------------------------------------


def write_tiny(to: Path, sources: Sequence[str], rows: int = ROWS) -> None:
    """Write a training set per name in `sources` and the evaluation suite into the folder `to`, each with `rows` rows.

    The sources take turns through five kinds: image to text, text to image, image and text to image with negatives, text to text, image to
    image. Equal arguments give equal rows and pixels. Raises DataError for a name that cannot be a folder.
    """
    for index, name in enumerate(sources):
        if name in ("", ".", "..") or "/" in name:
            raise DataError(f"{TINY_ROOT}: source {name!r} cannot be the name of a folder")
        made = [KINDS[index % len(KINDS)](thing) for thing in itertools.islice(_cycle(name), rows)]
        _write_parquet(to / "train" / name / "original-00000-of-00001.parquet", pa.Table.from_pylist(made))
    for name in EVAL_SETS:
        _write_parquet(to / "eval" / name / "test-00000-of-00001.parquet", pa.table(_eval_rows(name, rows)))
    for thing in ALL:
        for look, folder in enumerate(["train/images/tiny/Train"] * 2 + ["eval_images/tiny"] * 2):
            _write_png(to / folder / thing.file(look), thing.draw(look))
        _write_png(to / "eval_images/tiny" / _scene_file(thing), _scene(thing))
    (to / "datasets.yaml").write_text(_suite(sources, rows), encoding="utf-8")


def tiny_root(sources: Sequence[str], rows: int = ROWS) -> Path:
    """The training folder of `write_tiny`, made once and kept in the cache folder (VLM2VEC_CACHE, or ~/.cache/vlm2vec)."""
    place = io.cache_folder() / f"tiny-{io.digest([VERSION, list(sources), rows])[:16]}"
    if not (place / io.MANIFEST).exists():
        with io.publishing(place) as staging:
            write_tiny(staging, sources, rows)
    return place / "train"


def _write_parquet(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def _write_png(file: Path, picture: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def _suite(sources: Sequence[str], rows: int) -> str:
    shared = {"split": "IND", "queries": rows, "source": "made up", "licence": "CC0-1.0", "note": "coloured shapes"}
    sets = [
        {"name": name, "path": f"eval/{name}", "meta_task": spec.meta_task, "candidates": len(spec.candidates), **shared}
        | {"query_modality": spec.query_modality, "target_modality": spec.target_modality}
        for name, spec in EVAL_SETS.items()
    ]
    train = [{"name": name, "path": f"train/{name}", "meta_task": "retrieval", "rows": rows} for name in sources]
    return dump_plain({"suite": "tiny", "description": "coloured shapes, drawn by the library", "root": ".", "sets": sets, "train": train})
