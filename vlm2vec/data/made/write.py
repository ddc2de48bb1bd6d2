"""Writes made-up MMEB data in the layouts of the published ones.

    <to>/MMEB-eval/<SET>/test-00000-of-00001.parquet              pictures: <to>/MMEB-eval/eval_images/<SET>
    <to>/MMEB-train/<SUBSET>/original-00000-of-00001.parquet      pictures: <to>/MMEB-train/images/<SUBSET>/Train
    <to>/datasets.yaml                                            the suite, with the counts that were made

Equal arguments give equal rows and pixels, and equal bytes with equal versions of Pillow and pyarrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.data.made import texts, traps
from vlm2vec.data.made.pictures import Picture
from vlm2vec.data.made.sets import EvalRows, Side, Size, TrainRows, eval_rows, train_rows
from vlm2vec.data.sampler import random_words
from vlm2vec.errors import DataError
from vlm2vec.strict_yaml import dump_plain
from vlm2vec.suite import SetSpec, Suite, TrainSpec

Layout = Literal["v1", "instruct", "old"]
B3_NEGATIVES = 3


def write_made(
    to: Path,
    suite: Suite,
    *,
    queries: int = 8,
    candidates: int = 6,
    train_rows: int = 12,
    layout: Layout = "v1",
    seed: int = 17,
    full: bool = False,
) -> None:
    """Write every evaluation set of `suite`, and the training sets that belong to them, into the folder `to`.

    A set gets at most `queries` rows with `candidates` candidates, or with `full` as many as the suite says, of both and of distinct ones.
    The layout is that of the evaluation rows: "v1", "instruct" (MMEB-V2: instructions in columns of their own) or "old" (targets that are
    pictures have one "" for text). Raises DataError for a count below 1.
    """
    check_counts(queries=queries, candidates=candidates, train_rows=train_rows)
    size = Size(queries, candidates, full)
    made = []
    for spec in suite.sets:
        rows = eval_rows(spec, suite, size, seed)
        write_table(to / "MMEB-eval" / spec.path / "test-00000-of-00001.parquet", eval_table(rows, layout))
        _write_pictures(to / "MMEB-eval" / "eval_images", rows.pictures)
        made.append(rows.spec)
    trained = []
    for source in train_sets(suite, train_rows, size, seed):
        for split, table in train_tables(source, seed).items():
            write_table(to / "MMEB-train" / source.spec.path / f"{split}-00000-of-00001.parquet", table)
        _write_pictures(to / "MMEB-train", source.pictures(_negatives_listed(source)))
        trained.append(source.spec)
    (to / "datasets.yaml").write_text(_sheet(suite, made, trained), encoding="utf-8")


def write_b3(to: Path, suite: Suite, *, train_rows: int = 12, seed: int = 17) -> None:
    """Write the training sets of `suite` with lists of negatives: `<to>/<SUBSET>/train-00000-of-00001.parquet`, pictures beside them.

    A list has 3 negatives and two entries that hold nothing: "" for text, "" and null for pictures. Raises DataError for a count below 1.
    """
    check_counts(train_rows=train_rows)
    for source in train_sets(suite, train_rows, Size(), seed, B3_NEGATIVES):
        write_table(to / source.spec.path / "train-00000-of-00001.parquet", b3_table(source))
        _write_pictures(to, source.pictures(B3_NEGATIVES))


def check_counts(**counts: int) -> None:
    """Raises DataError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"made-up data: {name} must be >= 1, got {count}")


def train_sets(suite: Suite, rows: int, size: Size, seed: int, negatives: int = 1) -> Iterable[TrainRows]:
    """The training sets that belong to an evaluation set of `suite`."""
    tested = {spec.train for spec in suite.sets}
    return (train_rows(spec, suite, rows, size, seed, negatives) for spec in suite.train if spec.name in tested)


def write_table(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def _write_pictures(root: Path, pictures: Sequence[Picture]) -> None:
    for folder in {(root / picture.path).parent for picture in pictures}:
        folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (root / picture.path).write_bytes(picture.data)


# -- evaluation rows ---------------------------------------------------------------------------------------------------------------------


def eval_table(rows: EvalRows, layout: Layout) -> pa.Table:
    """The rows of one evaluation set as a table of its layout."""
    spec = rows.spec
    paths = {"qry_img_path": _texts(map(_path, rows.queries))}
    target_paths = _lists(rows, [_path(side) or (None if spec.name in traps.NULL_PATHS else "") for side in rows.candidates])
    if layout == "instruct":
        query = [texts.query_parts(spec, side.words) for side in rows.queries]
        target = [texts.target_parts(spec, side.words) for side in rows.candidates]
        columns = {"qry_inst": _texts(part for part, _ in query), "qry_text": _texts(part for _, part in query)} | paths
        columns |= {"tgt_inst": _texts([target[0][0]] * len(query)), "tgt_text": _lists(rows, [part for _, part in target])}
    else:
        columns = {"qry_text": _texts(texts.fill(spec.query, side.words) for side in rows.queries)} | paths
        wordless = layout == "old" and spec.target_modality == "I"
        full = [texts.fill(spec.target, side.words) for side in rows.candidates]
        columns["tgt_text"] = _texts([""] * len(rows.queries)) if wordless else _lists(rows, full)
    return pa.table(columns | {"tgt_img_path": target_paths})


def _path(side: Side) -> str:
    return side.picture.path if side.picture else ""


def _texts(values: Iterable[str]) -> pa.Array:
    return pa.array(values, pa.string())


def _lists(rows: EvalRows, values: Sequence[str | None]) -> pa.Array:
    """The value of each listed candidate: (Q,) lists of M."""
    queries, listed = rows.members_QM.shape
    offsets = pa.array(np.arange(queries + 1) * listed, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values, pa.string()).take(pa.array(rows.members_QM.ravel())))


# -- training rows -----------------------------------------------------------------------------------------------------------------------


def train_tables(rows: TrainRows, seed: int) -> dict[str, pa.Table]:
    """The tables by split: `train` is `original` under its first name, `diverse_instruction` has other words around the same queries."""
    original = _train_table(rows)
    numbers = random_words(len(rows.queries), seed, "diverse", rows.spec.name) % np.uint64(len(texts.PARAPHRASES))
    queries = zip(rows.queries, numbers.tolist(), strict=True)
    diverse = [texts.diverse(rows.shown.query, side.words, number) for side, number in queries]
    return {"original": original, "train": original, "diverse_instruction": original.set_column(0, "qry", _texts(diverse))}


def _negatives_listed(rows: TrainRows) -> int:
    """How many negatives a row of `original` has: 0 or 1."""
    return int(rows.spec.name not in traps.NO_NEGATIVE_COLUMNS | traps.EMPTY_NEGATIVES)


def _train_table(rows: TrainRows) -> pa.Table:
    columns = _pairs(rows)
    if rows.spec.name not in traps.NO_NEGATIVE_COLUMNS:
        sides = [row[0] if _negatives_listed(rows) else None for row in rows.negatives]
        bare = rows.spec.name in traps.BARE_NEGATIVES
        columns["neg_text"] = _texts("" if side is None or bare else _target(rows, side) for side in sides)
        columns["neg_image_path"] = _texts("" if side is None else _path(side) for side in sides)
    return pa.table(columns)


def b3_table(rows: TrainRows) -> pa.Table:
    """The rows with lists of negatives, as many as they have."""
    neg_text = [[_target(rows, side) for side in row] + ["", ""] for row in rows.negatives]
    neg_paths = [[*map(_path, row), "", None] for row in rows.negatives]
    lists = {"neg_text": pa.array(neg_text, pa.list_(pa.string())), "neg_image_path": pa.array(neg_paths, pa.list_(pa.string()))}
    return pa.table(_pairs(rows) | lists)


def _pairs(rows: TrainRows) -> dict[str, pa.Array]:
    return {
        "qry": _texts(texts.fill(rows.shown.query, side.words) for side in rows.queries),
        "qry_image_path": _texts(map(_path, rows.queries)),
        "pos_text": _texts(_target(rows, side) for side in rows.positives),
        "pos_image_path": _texts(map(_path, rows.positives)),
    }


def _target(rows: TrainRows, side: Side) -> str:
    return texts.fill(rows.shown.target, side.words)


# -- the suite ---------------------------------------------------------------------------------------------------------------------------


def _sheet(suite: Suite, sets: Sequence[SetSpec], train: Sequence[TrainSpec]) -> str:
    made = [dataclasses.replace(spec, source="made up by vlm2vec", licence="CC0-1.0") for spec in sets]
    description = f"coloured shapes, drawn by the library, in the layout of {suite.name}; a score here says nothing of {suite.name}"
    head = {"suite": f"{suite.name}-made", "description": description, "root": "MMEB-eval"}
    return dump_plain(head | {"sets": [_plain(spec) for spec in made], "train": [_plain(spec) for spec in train]})


def _plain(spec: SetSpec | TrainSpec) -> dict[str, Any]:
    """What differs from the defaults; where the facts came from no longer holds."""
    fields = {field.name: (getattr(spec, field.name), field.default) for field in dataclasses.fields(spec) if field.name != "known"}
    return {name: value for name, (value, default) in fields.items() if value != default}
