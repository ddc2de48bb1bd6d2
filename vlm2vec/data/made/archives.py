"""The made-up data packed as the published repositories hold them, one folder per repository, for tests of what unpacks them.

TIGER-Lab/MMEB-train           <SUBSET>/<split>-00000-of-00001.parquet, images_zip/<SUBSET>.zip (<SUBSET>/Train/<file>)
TIGER-Lab/MMEB-eval            <SET>/test-00000-of-00001.parquet, images.zip (<SET>/<file>)
TIGER-Lab/MMEB-V2              image-tasks/mmeb_v1.tar.gz (MMEB/<SET>/<file>)
ziyjiang/MMEB_Test_Instruct    <SET>/test-00000-of-00001.parquet, the evaluation rows of MMEB-V2
VLM2Vec/B3-2b                  <SUBSET>/train-00000-of-00001.parquet, training rows with lists of negatives; pictures as in MMEB-train
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from vlm2vec.data.made.pictures import Picture
from vlm2vec.data.made.sets import Size, eval_rows
from vlm2vec.data.made.write import B3_NEGATIVES, b3_table, check_counts, eval_table, train_sets, train_tables, write_table
from vlm2vec.suite import Suite

TRAIN, EVAL, V2 = "TIGER-Lab/MMEB-train", "TIGER-Lab/MMEB-eval", "TIGER-Lab/MMEB-V2"
INSTRUCT, B3 = "ziyjiang/MMEB_Test_Instruct", "VLM2Vec/B3-2b"
APPLE_DOUBLE = b"\0\5\26\7\0\2\0\0Mac OS X        "  # how a file starts in which macOS keeps attributes of another
Entries = Iterator[tuple[str, bytes]]


def write_archives(to: Path, suite: Suite, *, queries: int = 8, candidates: int = 6, train_rows: int = 12, seed: int = 17) -> None:
    """Write the repositories as folders `<to>/<owner>/<name>`, with what `write_made` makes of the same arguments, and rows as `write_b3`.

    Archives of the training pictures also hold what macOS adds. Equal arguments give equal bytes, as for `write_made`.
    """
    check_counts(queries=queries, candidates=candidates, train_rows=train_rows)
    size = Size(queries, candidates)
    pictures: dict[str, Picture] = {}
    for spec in suite.sets:
        rows = eval_rows(spec, suite, size, seed)
        write_table(to / EVAL / spec.path / "test-00000-of-00001.parquet", eval_table(rows, "v1"))
        write_table(to / INSTRUCT / spec.path / "test-00000-of-00001.parquet", eval_table(rows, "instruct"))
        pictures |= {picture.path: picture for picture in rows.pictures}
    _write_zip(to / EVAL / "images.zip", _entries(pictures.values()))
    _write_tar(to / V2 / "image-tasks" / "mmeb_v1.tar.gz", "MMEB", _entries(pictures.values()))
    for source in train_sets(suite, train_rows, size, seed, B3_NEGATIVES):
        for split, table in train_tables(source, seed).items():
            write_table(to / TRAIN / source.spec.path / f"{split}-00000-of-00001.parquet", table)
        write_table(to / B3 / source.spec.path / "train-00000-of-00001.parquet", b3_table(source))
        found = source.pictures(B3_NEGATIVES)
        _write_zip(to / TRAIN / "images_zip" / f"{source.spec.path}.zip", _zipped_on_a_mac(found))


def _entries(pictures: Iterable[Picture]) -> Entries:
    return ((picture.path, picture.data) for picture in pictures)


def _zipped_on_a_mac(pictures: Iterable[Picture]) -> Entries:
    """Pictures below images/, each with the hidden file of its attributes beside it or in a tree of their own, by turns."""
    for number, picture in enumerate(pictures):
        path = PurePosixPath(picture.path).relative_to("images")
        yield str(path), picture.data
        hidden = path.with_name(f"._{path.name}")
        yield str(hidden if number % 2 else "__MACOSX" / hidden), APPLE_DOUBLE
        if number == 0:
            yield str(path.with_name(".DS_Store")), b"\0\0\0\1Bud1"


def _write_zip(file: Path, entries: Entries) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in entries:
            archive.writestr(zipfile.ZipInfo(path, (2024, 10, 8, 0, 0, 0)), data)


def _write_tar(file: Path, top: str, entries: Entries) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for path, data in entries:
            entry = tarfile.TarInfo(f"{top}/{path}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
