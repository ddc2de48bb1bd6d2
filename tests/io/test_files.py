from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm2vec import io
from vlm2vec.errors import EnvError, InputError


def test_sha256_of_bytes_and_of_a_file_longer_than_one_block(tmp_path: Path) -> None:
    data = b"0123456789" * 300_000
    (tmp_path / "file").write_bytes(data)
    assert io.sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert io.sha256_file(tmp_path / "file") == io.sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_digest_does_not_depend_on_the_order_of_keys_and_does_on_all_else() -> None:
    assert io.digest({"a": 1, "b": [1.5, None, "ä\ud800"]}) == io.digest({"b": [1.5, None, "ä\ud800"], "a": 1})
    assert io.digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert len({io.digest(value) for value in ({"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": True}, {"a": 1, "b": None})}) == 6
    with pytest.raises(ValueError):
        io.digest(float("nan"))


def test_write_atomic_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    io.write_atomic(path, "grün\n")
    with open(path, encoding="utf-8") as reader:
        io.write_atomic(path, b"second")
        assert reader.read() == "grün\n"  # who had opened the old file still reads it whole
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file.txt"]


def test_write_atomic_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    io.write_atomic(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "x"


def test_write_atomic_killed_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Callable[..., int]
) -> None:
    path, seen = tmp_path / "file", []
    for point in range(1, 100):
        path.write_text("old")
        monkeypatch.setenv("VLM2VEC_FAULT", f"*:{point}:kill")
        ended = forked(io.write_atomic, path, "new")
        seen.append(path.read_text())
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert sorted(seen, reverse=True) == seen  # "old" up to the rename, "new" from then on
    assert seen.count("old") == 4 and seen.count("new") == 4


@pytest.mark.parametrize("kind", ["enospc", "eio", "eacces"])
@pytest.mark.parametrize("point", ["after-write", "before-fsync", "after-fsync", "before-rename"])
def test_write_atomic_refused_leaves_the_old_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, kind: str
) -> None:
    io.write_atomic(tmp_path / "file", "old")
    monkeypatch.setenv("VLM2VEC_FAULT", f"{point}:1:{kind}")
    with pytest.raises(EnvError, match=r"cannot write .*file: .* \(needs at least 3 bytes, [\d,]+ bytes free\)"):
        io.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_where_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="cannot write"):
        io.write_atomic(tmp_path / "file" / "below", "x")
    with pytest.raises(EnvError, match="cannot write"):
        io.write_atomic(tmp_path, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"file\.json:2: not JSON"),
        (b'{"a": 1,\n "\xff": 2}', r"file\.json:2: byte 11 is not UTF-8"),
        (b"[" * 100_000, r"file\.json: not usable JSON"),
        (b"", r"file\.json:1: not JSON"),
        (b"9" * 5000, r"file\.json: not usable JSON"),
    ],
)
def test_read_json_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        io.read_json(tmp_path / "file.json")


def test_read_json_of_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            io.read_json(path)


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"text": "日本 \ud800 \u2028", "numbers": [1, 0.1, 1e-300, None, True]}
    io.write_json(tmp_path / "file.json", value)
    assert io.read_json(tmp_path / "file.json") == value
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert io.read_json(tmp_path / "bom.json") == [1]
    with pytest.raises(ValueError):
        io.write_json(tmp_path / "file.json", float("inf"))
    assert io.read_json(tmp_path / "file.json") == value


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path, rows = tmp_path / "new" / "log.jsonl", [{"step": 1, "text": "a\nb\u2028c"}, {"step": 2}, {"step": 3}]
    for row in rows:
        io.append_jsonl(path, row)
    assert io.read_jsonl(path) == rows
    io.rewrite_jsonl(path, rows[:2])
    assert io.read_jsonl(path) == rows[:2]
    io.rewrite_jsonl(path, [])
    assert io.read_jsonl(path) == []


def test_torn_line_is_dropped_and_the_next_append_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b'{"step": 1}\n'
    last = '{"step": 2, "text": "ä"}\n'.encode()
    for size in range(len(last) + 1):
        path.write_bytes(whole + last[:size])
        kept = [{"step": 1}] + ([{"step": 2, "text": "ä"}] if size >= len(last) - 1 else [])
        assert io.read_jsonl(path) == kept
        io.append_jsonl(path, {"step": 3})
        assert io.read_jsonl(path) == [*kept, {"step": 3}]
        assert path.read_bytes().endswith(b'}\n{"step": 3}\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', r"rows\.jsonl:2: not JSON .*\{\"a\": "),
        (b'{"a": 1}\n\n[1]\n', r"rows\.jsonl:3: expected an object, got list"),
        (b'{"a": "\xff"}\n', r"rows\.jsonl:1: not JSON"),
        (b"[" * 100_000 + b"\n", r"rows\.jsonl:1: not JSON"),
        (b'{"a": 1}\nnull\n', r"rows\.jsonl:2: expected an object, got NoneType"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        io.read_jsonl(tmp_path / "rows.jsonl")
    assert len(str(caught.value)) < 400


def test_foreign_line_ends_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert io.read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]


def test_append_to_a_full_disk_leaves_whole_lines(tmp_path: Path, forked: Callable[..., int]) -> None:
    path = tmp_path / "log.jsonl"
    io.append_jsonl(path, {"step": 1})
    size = path.stat().st_size

    def child() -> None:
        for extra in range(12):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + extra, resource.RLIM_INFINITY))
            with pytest.raises(EnvError, match="needs at least 12 bytes"):
                io.append_jsonl(path, {"step": 2})
            assert json.loads(path.read_text()) == {"step": 1}
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 12, resource.RLIM_INFINITY))
        io.append_jsonl(path, {"step": 2})

    assert forked(child) == 0
    assert io.read_jsonl(path) == [{"step": 1}, {"step": 2}]
