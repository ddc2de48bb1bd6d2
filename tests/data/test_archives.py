"""Archives of strangers: what is harmless comes out exactly, what is hostile comes out not at all."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm2vec.data import archives
from vlm2vec.data.archives import Limits, is_junk, require_space, show_bytes, unpack, unsafe
from vlm2vec.errors import DataError, EnvError

GOOD = {"A/Train/0.png": b"zero", "A/Train/hot dog.jpg": b"one" * 1000, "B/x.png": b"", "C/k\u00e4fer.png": b"utf-8"}
JUNK = {"__MACOSX/A/._0.png": b"fork", "A/Train/._0.png": b"fork", "A/.DS_Store": b"store"}


def make_zip(file: Path, members: dict[str, bytes], edit: Callable[[zipfile.ZipInfo], None] | None = None) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if edit:
                edit(info)
            opened.writestr(info, data)
    return file


def make_tar(file: Path, members: dict[str, bytes], edit: Callable[[tarfile.TarInfo], None] | None = None) -> Path:
    with tarfile.open(file, "w:gz") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if edit:
                edit(info)
            opened.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return file


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MAKERS = pytest.mark.parametrize(("make", "suffix"), [(make_zip, "zip"), (make_tar, "tar.gz")], ids=["zip", "tar.gz"])


@MAKERS
def test_files_come_out_and_junk_stays_in(make: Callable, suffix: str, tmp_path: Path) -> None:
    archive = make(tmp_path / f"a.{suffix}", {"A/": b"", **GOOD, **JUNK} if suffix == "zip" else {**GOOD, **JUNK})
    made = unpack(archive, tmp_path / "out", tmp_path / "staging")
    assert files_below(tmp_path / "out") == GOOD
    assert (made.files, made.bytes, made.junk) == (4, sum(map(len, GOOD.values())), 3)
    assert made.folders == {"A/Train": 2, "B": 1, "C": 1}
    assert not (tmp_path / "staging").exists() and not made.notes


@MAKERS
def test_a_top_folder_moves_up_and_only_wanted_files_come_out(make: Callable, suffix: str, tmp_path: Path) -> None:
    archive = make(tmp_path / f"a.{suffix}", {f"MMEB/{name}": data for name, data in GOOD.items()} | {"README.md": b"words"})
    assert unpack(archive, tmp_path / "all", tmp_path / "s", strip="MMEB").files == 5
    assert files_below(tmp_path / "all") == GOOD | {"README.md": b"words"}
    wanted = {"A/Train/0.png", "B/x.png", "not/there.png"}
    assert unpack(archive, tmp_path / "some", tmp_path / "s", strip="MMEB", wanted=wanted).files == 2
    assert set(files_below(tmp_path / "some")) == {"A/Train/0.png", "B/x.png"}


def test_unpacking_adds_to_what_is_there_and_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "out/A/Train").mkdir(parents=True)
    (tmp_path / "out/A/Train/0.png").write_bytes(b"old")
    (tmp_path / "out/A/Train/mine.png").write_bytes(b"mine")
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging/left by a kill").write_bytes(b"?")
    unpack(make_zip(tmp_path / "a.zip", GOOD), tmp_path / "out", tmp_path / "staging")
    assert files_below(tmp_path / "out") == GOOD | {"A/Train/mine.png": b"mine"}


def test_names_of_macos_without_the_utf8_flag_are_read_as_utf8(tmp_path: Path) -> None:
    file = make_zip(tmp_path / "a.zip", {"kXXfer.png": b"x"})
    file.write_bytes(file.read_bytes().replace(b"kXXfer", "k\u00e4fer".encode()))
    unpack(file, tmp_path / "out", tmp_path / "s")
    assert set(files_below(tmp_path / "out")) == {"k\u00e4fer.png"}


@MAKERS
def test_names_that_differ_in_case_are_reported_and_of_repeats_the_later_one_stays(make: Callable, suffix: str, tmp_path: Path) -> None:
    made = unpack(make(tmp_path / f"a.{suffix}", {"A/x.png": b"1", "A/X.PNG": b"2"}), tmp_path / "out", tmp_path / "s")
    assert made.files == 2 and "differ from another only in case" in made.notes[0] and "A/x.png and A/X.PNG" in made.notes[0]
    twice = make(tmp_path / f"b.{suffix}", {"A/x.png": b"1", "A/./x.png": b"two"})
    made = unpack(twice, tmp_path / "twice", tmp_path / "s")
    assert files_below(tmp_path / "twice") == {"A/x.png": b"two"} and (made.files, made.bytes) == (1, 3) and "twice" in made.notes[0]


# -- hostile -----------------------------------------------------------------------------------------------------------------------------


def zip_link(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def zip_device(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFCHR | 0o666) << 16


def tar_kind(kind: bytes, link: str = "") -> Callable[[tarfile.TarInfo], None]:
    def edit(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, link, 0

    return edit


def encrypted(file: Path) -> Path:
    make_zip(file, {"a.png": b"secret"})
    data = bytearray(file.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + offset] |= 1
    file.write_bytes(data)
    return file


def lying_about_its_size(file: Path) -> Path:
    """A pax header that claims 8 GB; a reader that believes it allocates as much."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    with gzip.open(file, "wb") as stream:
        stream.write(header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    return file


def overlapping(file: Path) -> Path:
    """Two entries of the directory that point at the same bytes (a bomb of the overlapping kind)."""
    make_zip(file, {"a.png": b"0" * 100_000, "b.png": b"1"})
    data = bytearray(file.read_bytes())
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    file.write_bytes(data)
    return file


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def damaged(file: Path) -> Path:
    make_zip(file, {"a.png": os.urandom(5000)})
    data = bytearray(file.read_bytes())
    data[2000] ^= 255
    file.write_bytes(data)
    return file


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "zip absolute path": lambda p: make_zip(p / "a.zip", {"/etc/cron.d/x": b"!"}),
    "zip parent": lambda p: make_zip(p / "a.zip", {"../escaped.png": b"!"}),
    "zip parent inside": lambda p: make_zip(p / "a.zip", {"A/../../escaped.png": b"!"}),
    "zip backslash parent": lambda p: make_zip(p / "a.zip", {"A\\..\\..\\escaped.png": b"!"}),
    "zip backslash": lambda p: make_zip(p / "a.zip", {"A\\x.png": b"!"}),
    "zip drive": lambda p: make_zip(p / "a.zip", {"C:/x.png": b"!"}),
    "zip link": lambda p: make_zip(p / "a.zip", {"A": b"/etc"}, zip_link),
    "zip device": lambda p: make_zip(p / "a.zip", {"A": b""}, zip_device),
    "zip encrypted": lambda p: encrypted(p / "a.zip"),
    "zip long name": lambda p: make_zip(p / "a.zip", {"A/" + "x" * 300 + ".png": b"!"}),
    "zip long path": lambda p: make_zip(p / "a.zip", {"/".join(["x" * 99] * 50): b"!"}),
    "zip bomb": lambda p: make_zip(p / "a.zip", {"a.png": bytes(5_000_000)}),
    "zip of many": lambda p: make_zip(p / "a.zip", {f"{number}.png": b"" for number in range(101)}),
    "zip overlapping": lambda p: overlapping(p / "a.zip"),
    "zip damaged": lambda p: damaged(p / "a.zip"),
    "zip cut short": lambda p: cut(make_zip(p / "a.zip", {"a.png": os.urandom(5000)})),
    "zip file and folder": lambda p: make_zip(p / "a.zip", {"A": b"!", "A/x.png": b"!"}),
    "zip folder and file": lambda p: make_zip(p / "a.zip", {"A/x.png": b"!", "A": b"!"}),
    "tar absolute path": lambda p: make_tar(p / "a.tar.gz", {"/etc/cron.d/x": b"!"}),
    "tar parent": lambda p: make_tar(p / "a.tar.gz", {"../escaped.png": b"!"}),
    "tar symbolic link": lambda p: make_tar(p / "a.tar.gz", {"A": b""}, tar_kind(tarfile.SYMTYPE, "/etc")),
    "tar hard link": lambda p: make_tar(p / "a.tar.gz", {"A": b""}, tar_kind(tarfile.LNKTYPE, "/etc/passwd")),
    "tar device": lambda p: make_tar(p / "a.tar.gz", {"A": b""}, tar_kind(tarfile.CHRTYPE)),
    "tar pipe": lambda p: make_tar(p / "a.tar.gz", {"A": b""}, tar_kind(tarfile.FIFOTYPE)),
    "tar bomb": lambda p: make_tar(p / "a.tar.gz", {"a.png": bytes(5_000_000)}),
    "tar of many": lambda p: make_tar(p / "a.tar.gz", {f"{number}.png": b"" for number in range(101)}),
    "tar header that lies": lambda p: lying_about_its_size(p / "a.tar.gz"),
    "tar cut short": lambda p: cut(make_tar(p / "a.tar.gz", {"a.png": os.urandom(50_000)})),
    "tar file and folder": lambda p: make_tar(p / "a.tar.gz", {"A": b"!", "A/x.png": b"!"}),
}


WORDS = {  # where another guard would stand in, the one that is meant
    "zip encrypted": "is encrypted; refused",
    "zip link": "is a link",
    "zip device": "is a special file",
    "zip long name": "too long",
    "tar header that lies": "claims 8,589,934,592 bytes",
    "tar pipe": "is a special file",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_leaves_nothing(kind: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "place").mkdir()
    archive = HOSTILE[kind](tmp_path / "made")
    before = files_below(tmp_path)
    with pytest.raises(DataError, match=r"nothing was unpacked|neither a zip") as error:
        unpack(archive, tmp_path / "place/out", tmp_path / "place/staging", limits=Limits(entries=100, bytes=4_000_000, spare=1_000_000))
    assert archive.name in str(error.value) and WORDS.get(kind, "") in str(error.value)
    assert files_below(tmp_path) == before
    assert not list((tmp_path / "place/out").iterdir()) and not (tmp_path / "place/staging").exists()


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"<!doctype html>")
    with pytest.raises(DataError, match="neither a zip nor a tar.gz archive"):
        unpack(tmp_path / "images.zip", tmp_path / "out", tmp_path / "s")


def test_the_ratio_counts_beyond_the_spare_bytes(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a.png": bytes(2_000_000)})  # about 1000:1
    assert unpack(archive, tmp_path / "out", tmp_path / "s", limits=Limits(ratio=10, spare=2_000_000)).bytes == 2_000_000
    with pytest.raises(DataError, match="over 1 MB"):
        unpack(archive, tmp_path / "out2", tmp_path / "s", limits=Limits(ratio=10, spare=1_000_000))


@pytest.mark.parametrize("name", ["a/b.png", "./a", "a b", "..a", "a..b/c", "k\u00e4fer"])
def test_plain_names_are_safe(name: str) -> None:
    assert not unsafe(name)


@pytest.mark.parametrize("name", ["", "..", "a/..", "/a", "\\a", "a\0b", "D:x", "a\\b", "\ud800"])
def test_other_names_are_not(name: str) -> None:
    assert unsafe(name)


def test_junk_is_known_by_name() -> None:
    junk = ["__MACOSX/a.png", "a/__MACOSX/b", "__MACOSX/", "._a.png", "a/._b", ".DS_Store", "a/Thumbs.db"]
    assert [is_junk(name) for name in (*junk, "a._b", "MACOSX/a", "a/_b.png", ".hidden/a.png")] == [True] * 7 + [False] * 4


# -- disk --------------------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", GOOD)
    monkeypatch.setenv("VLM2VEC_FAULT", "unpacked:2:enospc")
    with pytest.raises(EnvError, match=r"No space left.*bytes free"):
        unpack(archive, tmp_path / "out", tmp_path / "s")
    assert not files_below(tmp_path / "out") and not (tmp_path / "s").exists()
    monkeypatch.delenv("VLM2VEC_FAULT")
    assert unpack(archive, tmp_path / "out", tmp_path / "s").files == 4


def test_room_is_asked_for_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "free_space", lambda folder: 1000)
    assert require_space(tmp_path / "new/er", 1000, "it", "less") == 1000
    with pytest.raises(EnvError, match=r"new/er: it needs 1 kB, 1 kB are free; less"):
        require_space(tmp_path / "new/er", 1001, "it", "less")


def test_free_space_asks_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert archives.free_space(tmp_path / "not/yet") > 0


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (7_130_000_000, "7.13 GB"), (2e12, "2 TB")])
def test_sizes_read_as_the_hub_shows_them(count: float, text: str) -> None:
    assert show_bytes(count) == text


def test_a_killed_unpacking_is_done_again(tmp_path: Path, forked: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", GOOD)
    for point in ("unpacked:3:kill", "before-rename:2:kill"):
        monkeypatch.setenv("VLM2VEC_FAULT", point)
        assert forked(unpack, archive, tmp_path / "out", tmp_path / "s") == -9
    monkeypatch.delenv("VLM2VEC_FAULT")
    unpack(archive, tmp_path / "out", tmp_path / "s")
    assert files_below(tmp_path / "out") == GOOD and not (tmp_path / "s").exists()
