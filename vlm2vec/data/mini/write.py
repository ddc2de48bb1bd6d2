"""Rows and pictures to files, in MMEB's layout: <root>/train/<set>/original-*.parquet with pictures below <root>/train, and
<root>/eval/<set>/test-*.parquet with pictures below <root>/eval_images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.data.mini.draw import pixels
from vlm2vec.data.mini.pool import Mapper
from vlm2vec.data.mini.rows import Example, Picture, Question, Side, TaskRows
from vlm2vec.data.mini.spec import Negatives, SetSpec
from vlm2vec.errors import DataError

TRAIN_FILE, EVAL_FILE = "original-00000-of-00001.parquet", "test-00000-of-00001.parquet"
TRAIN_IMAGES, EVAL_IMAGES = "train", "eval_images"  # the folders that the rows' paths start from
JPEG_QUALITY = 90

Columns = dict[str, list[Any]]


def train_path(picture: Picture) -> str:
    """As MMEB-train has it."""
    return f"images/{picture.collection}/Train/{picture.file}"


def eval_path(picture: Picture) -> str:
    """As MMEB-eval has it."""
    return f"{picture.collection}/{picture.file}"


def write(root: Path, made: Sequence[tuple[SetSpec, TaskRows]], mapped: Mapper) -> None:
    """Write every row and every picture that a row shows. Raises DataError if two pictures would have the same file."""
    for spec, rows in made:
        _write_rows(root / "eval" / spec.name / EVAL_FILE, eval_columns(rows.questions))
        if rows.train:
            _write_rows(root / "train" / spec.name / TRAIN_FILE, train_columns(rows.train, spec.negatives))
    shown = [picture for _, rows in made for example in rows.train for picture in _pictures(_sides(example))]
    asked = [picture for _, rows in made for question in rows.questions for picture in _pictures((question.query, *question.candidates))]
    files = _files(root / TRAIN_IMAGES, shown, train_path) | _files(root / EVAL_IMAGES, asked, eval_path)
    for folder in sorted({file.parent for file in files}):
        folder.mkdir(parents=True)
    mapped(_save, files.items())


def train_columns(examples: Sequence[Example], negatives: Negatives) -> Columns:
    """The columns of MMEB-train; "" is what is not there."""
    columns: Columns = {
        "qry": [example.query.text for example in examples],
        "qry_image_path": [_path(example.query, train_path) for example in examples],
        "pos_text": [example.positive.text for example in examples],
        "pos_image_path": [_path(example.positive, train_path) for example in examples],
    }
    if negatives != "absent":
        cells = [_negative_cells(example, negatives) for example in examples]
        columns |= {"neg_text": [text for text, _ in cells], "neg_image_path": [path for _, path in cells]}
    return columns


def _negative_cells(example: Example, negatives: Negatives) -> tuple[Any, Any]:
    texts = [side.text for side in example.negatives]
    paths = [_path(side, train_path) for side in example.negatives]
    if negatives == "many":
        return texts, paths
    if negatives == "empty" or not texts:
        return "", ""
    return ("" if negatives == "bare" else texts[0]), paths[0]


def eval_columns(questions: Sequence[Question]) -> Columns:
    """The columns of MMEB-eval; the gold is the first target."""
    return {
        "qry_text": [question.query.text for question in questions],
        "qry_img_path": [_path(question.query, eval_path) for question in questions],
        "tgt_text": [[side.text for side in question.candidates] for question in questions],
        "tgt_img_path": [[_path(side, eval_path) for side in question.candidates] for question in questions],
    }


def _path(side: Side, path: Any) -> str:
    return path(side.picture) if side.picture else ""


def _write_rows(file: Path, columns: Columns) -> None:
    file.parent.mkdir(parents=True)
    kinds = {name: pa.list_(pa.string()) if isinstance(cells[0], list) else pa.string() for name, cells in columns.items()}
    pq.write_table(pa.table(columns, schema=pa.schema(kinds.items())), file)


def _sides(example: Example) -> tuple[Side, ...]:
    return (example.query, example.positive, *example.negatives)


def _pictures(sides: Iterable[Side]) -> Iterable[Picture]:
    return (side.picture for side in sides if side.picture)


def _files(root: Path, pictures: Iterable[Picture], path: Any) -> dict[Path, Picture]:
    """File -> picture, each once, what is drawn alike together. Some file systems do not tell upper from lower case."""
    distinct = dict.fromkeys(pictures)
    by_name: dict[str, Picture] = {}
    for picture in distinct:
        if by_name.setdefault(path(picture).casefold(), picture) != picture:
            raise DataError(f"two pictures of the embedded benchmark have the file {path(picture)}")
    return {root / path(picture): picture for picture in sorted(distinct, key=path)}


def _save(job: tuple[Path, Picture]) -> None:
    file, picture = job
    pixels(picture.drawing).save(file, quality=JPEG_QUALITY)  # PNG has no quality and takes no notice
