from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from vlm2vec import io
from vlm2vec.errors import EnvError, InputError, ManifestError
from vlm2vec.io import folders

FAULT_KINDS = ("enospc", "eio", "eacces")


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was flushed, without the wait: a killed process leaves its written pages to the kernel, flushed or not."""
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
    return names


def publish(directory: Path, text: str) -> None:
    """Three files by three writers, one of them in a subfolder."""
    with io.publishing(directory) as staging:
        io.write_json(staging / "state.json", {"text": text})
        (staging / "plain.txt").write_text(text)
        (staging / "sub" / "empty").mkdir(parents=True)
        save_file({"weight": np.full(100, len(text), dtype=np.float32)}, staging / "sub" / "weights.safetensors")


def published(directory: Path) -> str:
    io.verify_manifest(directory)
    return (directory / "plain.txt").read_text()


def test_folder_appears_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "new" / "step-000001"
    with io.publishing(target) as staging:
        assert staging.parent == target.parent
        (staging / "a.txt").write_text("abc")
        assert not target.exists()
    assert json.loads((target / "manifest.json").read_text()) == {
        "format": 1,
        "files": {"a.txt": {"sha256": io.sha256_bytes(b"abc"), "bytes": 3}},
    }
    assert os.listdir(target.parent) == ["step-000001"]


def test_all_is_flushed_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[str]
) -> None:
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (flushed.append("renamed"), rename(old, new)))
    with io.publishing(tmp_path / "out") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").touch()
        (staging / "b").touch()
        stage = staging.name
    manifest = flushed[2]
    assert manifest.startswith(".manifest.json.")  # written aside, then renamed
    assert flushed == ["b", "a", manifest, stage, stage, "sub", "renamed", tmp_path.name]


def test_error_in_the_body_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    for error in (KeyError("mine"), FileNotFoundError(2, "no such file", "elsewhere"), KeyboardInterrupt()):
        with pytest.raises(type(error)), io.publishing(tmp_path / "out") as staging:
            (staging / "half").write_text("x")
            raise error
    assert published(tmp_path / "out") == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_published_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    publish(tmp_path / "out", "old")
    (tmp_path / "out" / "added later").write_text("x")
    publish(tmp_path / "out", "new")
    assert published(tmp_path / "out") == "new"
    assert not (tmp_path / "out" / "added later").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_exchange_works_on_this_filesystem(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if folders._exchange(tmp_path / "a", tmp_path / "b"):
        assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]


def test_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not ours to replace"), io.publishing(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    publish(tmp_path / "empty", "new")
    (tmp_path / "empty" / "manifest.json").unlink()
    with io.publishing(tmp_path / "empty", replace=True) as staging:
        (staging / "plain.txt").write_text("newest")
    assert published(tmp_path / "empty") == "newest"


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("scratch/out")
    publish(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and published(tmp_path / "scratch" / "out") == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_the_umask_grants(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        publish(tmp_path / "out", "x")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_only_regular_files_are_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="link is no regular file"), io.publishing(tmp_path / "out") as staging:
        (staging / "link").symlink_to("/etc/passwd")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("case", ["first", "exchanged", "renamed twice"])
def test_kill_at_every_point_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Callable[..., int], case: str
) -> None:
    if case == "renamed twice":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    target, kills, seen = tmp_path / "out", 0, []
    for point in range(1, 100):
        monkeypatch.delenv("VLM2VEC_FAULT", raising=False)
        shutil.rmtree(target, ignore_errors=True)
        if case != "first":
            publish(target, "old")
        monkeypatch.setenv("VLM2VEC_FAULT", f"*:{point}:kill")
        ended = forked(publish, target, "new")
        monkeypatch.delenv("VLM2VEC_FAULT")
        kept = target if target.exists() else tmp_path / ".out.previous"
        seen.append(published(kept) if kept.exists() else "nothing")
        publish(tmp_path / "next", "next")  # the next publication beside it cleans up what was half done
        assert {path.name for path in tmp_path.iterdir()} <= {kept.name, "next"} | ({".out.previous"} if case == "renamed twice" else set())
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        kills += 1
    assert kills >= 20
    assert seen.index("new") == len(seen) - seen.count("new")  # never the old one again once the new one is there
    assert set(seen) == {"nothing" if case == "first" else "old", "new"}
    publish(target, "last")
    assert sorted(os.listdir(tmp_path)) == ["next", "out"]


@pytest.mark.parametrize("kind", FAULT_KINDS)
@pytest.mark.parametrize("case", ["first", "exchanged", "renamed twice"])
def test_refusal_at_every_point_is_explained_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, kind: str) -> None:
    if case == "renamed twice":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    target, refusals = tmp_path / "out", 0
    for point in range(1, 100):
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.previous", ignore_errors=True)
        if case != "first":
            publish(target, "old")
        monkeypatch.setenv("VLM2VEC_FAULT", f"*:{point}:{kind}")
        try:
            publish(target, "new")
        except EnvError as error:
            assert "cannot write" in str(error) and "bytes free" in str(error)
            refusals += 1
        else:
            break
        finally:
            monkeypatch.delenv("VLM2VEC_FAULT")
        assert {path.name for path in tmp_path.iterdir()} - {".out.previous"} == ({"out"} if target.exists() else set())
        assert published(target) in ("old", "new") if target.exists() else case == "first"
        assert case == "renamed twice" or not (tmp_path / ".out.previous").exists()
    assert refusals >= 20


def test_full_disk_at_32_sizes_leaves_the_old_and_names_the_bytes(tmp_path: Path, forked: Callable[..., int]) -> None:
    size, target = 100_000, tmp_path / "out"
    publish(target, "old")
    tokenizer = Tokenizer(models.WordLevel({f"word{index}": index for index in range(6000)}, unk_token="word0"))
    writers: list[Callable[[Path], object]] = [
        lambda folder: (folder / "plain.txt").write_bytes(b"x" * size),
        lambda folder: io.write_atomic(folder / "plain.txt", b"x" * size),
        lambda folder: save_file({"weight": np.zeros(size, dtype=np.uint8)}, folder / "plain.txt"),
        lambda folder: tokenizer.save(str(folder / "plain.txt")),
    ]

    def child() -> None:
        for step in range(32):
            limit = size * step // 32
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for write in writers:
                with pytest.raises(EnvError) as caught, io.publishing(target) as staging:
                    write(staging)
                found = re.fullmatch(r"cannot write (.*): File too large \(needs at least (.*) bytes, [\d,]+ .*\)", str(caught.value))
                assert found and Path(found[1]) == target
                assert found[2] == f"{limit:,}" or write is not writers[0]  # a plain write leaves what it had written by then
                with pytest.raises(EnvError, match="needs at least 1,234,567 bytes"), io.publishing(target, needed=1_234_567) as staging:
                    write(staging)
            assert os.listdir(tmp_path) == ["out"]
            assert published(target) == "old"

    assert forked(child) == 0


def test_vanished_or_closed_places(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="No such file"), io.publishing(tmp_path / "out") as staging:
        shutil.rmtree(staging)
        (staging / "a").write_text("x")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(EnvError, match="cannot write"):
            publish(target, "x")
    assert os.listdir(tmp_path) == ["file"]


def test_staging_of_a_living_publisher_is_left_alone(tmp_path: Path, forked: Callable[..., int]) -> None:
    with io.publishing(tmp_path / "a") as staging:
        (staging / "plain.txt").write_text("mine")
        assert forked(publish, tmp_path / "b", "other") == 0
        publish(tmp_path / "c", "same process")
    assert published(tmp_path / "a") == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_staging_that_is_cleaned_up_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, lock, losses = Path.mkdir, fcntl.flock, []

    def lose_after_mkdir(path: Path, *args: object, **options: object) -> None:
        make(path, *args, **options)  # type: ignore[arg-type]
        if ".staging-" in path.name and not losses:
            losses.append(path.rmdir())

    def lose_while_locking(descriptor: int, how: int) -> None:
        lock(descriptor, how)
        if len(losses) == 1:
            losses.append(os.rmdir(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(Path, "mkdir", lose_after_mkdir)
    monkeypatch.setattr(fcntl, "flock", lose_while_locking)
    publish(tmp_path / "out", "new")
    assert len(losses) == 2
    assert published(tmp_path / "out") == "new"


def test_many_publishers_of_one_folder(tmp_path: Path) -> None:
    children = []
    for child in range(6):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for turn in range(10):
                    publish(tmp_path / "out", f"{child} {turn}")
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
    assert published(tmp_path / "out").endswith("9")
    assert os.listdir(tmp_path) == ["out"]


# ---- the manifest


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    publish(tmp_path / "out", "x" * 50)
    io.verify_manifest(tmp_path / "out")
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    chance, found = random.Random(17), 0
    for trial in range(200):
        path = files[trial % len(files)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[chance.randrange(len(sound))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            io.verify_manifest(tmp_path / "out")
        except ManifestError:
            found += 1
        path.write_bytes(sound)
    io.verify_manifest(tmp_path / "out")
    assert (found, len(files)) == (200, 4)


def test_manifest_says_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def reason() -> str:
        with pytest.raises(ManifestError) as caught:
            io.verify_manifest(out)
        publish(out, "sound")
        return str(caught.value)

    publish(out, "sound")
    (out / "plain.txt").write_text("longer than before")
    assert "plain.txt has 18 bytes, expected 5" in reason()
    (out / "plain.txt").write_text("s0und")
    assert "plain.txt differs from its sha256" in reason()
    (out / "sub" / "weights.safetensors").unlink()
    assert "sub/weights.safetensors is missing" in reason()
    (out / "plain.txt").unlink()
    (out / "plain.txt").symlink_to("/etc/passwd")
    assert "plain.txt is missing (path leaves root" in reason()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "manifest missing"),
        ("", "manifest damaged"),
        ("{", "manifest damaged"),
        ("[]", "format 'list'"),
        ("{}", "format None"),
        ('{"format": 2, "files": {}}', "format 2, this version reads format 1"),
        ('{"format": 1}', "not listed"),
        ('{"format": 1, "files": {"a": 3}}', "not listed"),
        ('{"format": 1, "files": {"a": {"bytes": 3}}}', "not listed"),
        ('{"format": 1, "files": {"../secret": {"bytes": 3, "sha256": ""}}}', "path leaves root"),
    ],
)
def test_damaged_manifest(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=message):
        io.verify_manifest(tmp_path)


def test_a_published_folder_is_removed_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        with io.publishing(tmp_path / name) as staging:
            (staging / "x").write_text(name)
    io.unpublish(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("VLM2VEC_FAULT", "prune:1:eio")
    with pytest.raises(EnvError, match="cannot remove .*/b: Input/output error"):
        io.unpublish(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["x"]
