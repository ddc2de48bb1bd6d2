"""`vlm2vec data get`, end to end against a Hub on loopback: what comes, what lies where, what is left alone, and the room it takes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from tests.hub_data import EVAL, SETS, TRAIN, below, connect, eval_files, parquet, png, train_files, wanted
from tests.hub_server import Hub
from vlm2vec.cli import main
from vlm2vec.data import archives
from vlm2vec.data.downloads import load_sheet
from vlm2vec.data.fetch import fetch, preview, request_for
from vlm2vec.data.mmeb import read_eval, read_train
from vlm2vec.errors import EnvError, RunLockedError
from vlm2vec.io import run_lock

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as running:
        connect(running, monkeypatch, tmp_path)
        running.publish(EVAL, eval_files())
        yield running


# -- what comes --------------------------------------------------------------------------------------------------------------------------


def test_evaluation_sets_come_in_the_layout_that_readers_expect(server: Hub, tmp_path: Path) -> None:
    text = fetch(wanted(tmp_path)).text()
    found = below(tmp_path)
    assert set(found) == {f"{name}/{path}" for name in SETS for path in ("test-00000-of-00001.parquet",)} | {
        f"eval_images/{name}/{path}" for name in SETS for path in ("0.png", "1.png", "sub/2.png")
    }
    assert len(read_eval(tmp_path, "VOC2007", image_root=tmp_path / "eval_images").queries) == 2
    assert (
        "2 sets" in text
        and "6 files" in text
        and f"vlm2vec data check {tmp_path} --subset N24News VOC2007" in text
        and "make eval-mmeb" in text
    )
    state = json.loads((tmp_path / ".fetch/state.json").read_text())
    assert state["sources"][EVAL]["commit"] == server.heads[EVAL] and state["sources"][EVAL]["requested"] == "main"


def test_all_sets_take_everything_that_the_archive_holds(server: Hub, tmp_path: Path) -> None:
    rows = eval_files()["VOC2007/test-00000-of-00001.parquet"]
    names = load_sheet().find("mmeb-eval").sets()
    server.publish(EVAL, {f"{name}/test-00000-of-00001.parquet": rows for name in names} | {"images.zip": eval_files()["images.zip"]})
    text = fetch(request_for("mmeb-eval", tmp_path)).text()
    assert "eval_images/VOC2007/9.png" in below(tmp_path) and "36 sets, 36 files" in text
    assert f"vlm2vec data check {tmp_path}\n" in text
    asked = len(server.asked)
    fetch(wanted(tmp_path, "CIRR"))
    assert len(server.asked) == asked


def test_training_sets_come_with_one_archive_each(server: Hub, tmp_path: Path) -> None:
    server.publish(TRAIN, train_files())
    fetch(wanted(tmp_path, "VOC2007", dataset="mmeb-train"))
    assert set(below(tmp_path)) == {"VOC2007/original-00000-of-00001.parquet", "images/VOC2007/Train/a b.png"}
    assert read_train(tmp_path, "VOC2007")[0].query.images[0].source == tmp_path / "images/VOC2007/Train/a b.png"
    fetch(wanted(tmp_path, dataset="mmeb-train", split="all"))
    assert sum(name.endswith(".parquet") for name in below(tmp_path)) == 6 and "images/N24News/Train/a b.png" in below(tmp_path)
    assert sum(path.endswith("VOC2007.zip") for path in server.fetched()) == 1


def test_b3_rows_go_beside_the_pictures_of_mmeb_train(server: Hub, tmp_path: Path) -> None:
    server.publish(TRAIN, train_files())
    rows = {"qry": ["q"], "qry_image_path": [""], "pos_text": ["p"], "pos_image_path": [""], "neg_text": [["n"]], "neg_image_path": [[""]]}
    server.publish("VLM2Vec/B3-2b", {f"{name}/train-00000-of-00001.parquet": parquet(rows) for name in SETS})
    fetch(wanted(tmp_path, "VOC2007", dataset="mmeb-train"))
    fetch(wanted(tmp_path, "VOC2007", dataset="mmeb-b3-2b"))
    assert sum(path.endswith("VOC2007.zip") for path in server.fetched()) == 1
    assert read_train(tmp_path, "VOC2007", "B3-2b/VOC2007", "train")[0].negatives[0].text == "n"


def test_instruct_rows_take_the_pictures_of_a_tar_whose_top_folder_goes(server: Hub, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as opened:
        for path in ("0.png", "1.png", "sub/2.png", "9.png"):
            info = tarfile.TarInfo(f"MMEB/VOC2007/{path}")
            info.size = len(png(1))
            opened.addfile(info, io.BytesIO(png(1)))
    server.publish("ziyjiang/MMEB_Test_Instruct", eval_files())
    server.publish("TIGER-Lab/MMEB-V2", {"image-tasks/mmeb_v1.tar.gz": stream.getvalue()})
    fetch(wanted(tmp_path, "VOC2007", dataset="mmeb-eval-instruct"))
    assert {name for name in below(tmp_path) if "images" in name} == {
        f"eval_images/VOC2007/{path}" for path in ("0.png", "1.png", "sub/2.png")
    }


def test_archives_are_kept_on_request_and_used_again(server: Hub, tmp_path: Path) -> None:
    fetch(wanted(tmp_path, "VOC2007", keep_archives=True))
    assert below(tmp_path)["images.zip"] == eval_files()["images.zip"]
    fetch(wanted(tmp_path, "N24News"))
    assert sum(path.endswith("images.zip") for path in server.fetched()) == 1 and "images.zip" in below(tmp_path)


def test_a_dry_run_says_the_sizes_and_writes_nothing(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "get", "mmeb-eval", "--to", str(tmp_path / "new"), "--subset", *SETS, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert server.heads[EVAL] in said and "2 missing" in said and "free" in said and not (tmp_path / "new").exists()
    assert not server.fetched()


# -- again -------------------------------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_for_nothing_and_needs_no_network(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(wanted(tmp_path))
    asked, found = len(server.asked), below(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nothing was missing" in fetch(wanted(tmp_path)).text()
    assert len(server.asked) == asked and below(tmp_path) == found


def test_only_what_is_missing_or_damaged_comes_again(server: Hub, tmp_path: Path) -> None:
    fetch(wanted(tmp_path))
    found = below(tmp_path)
    (tmp_path / "VOC2007/test-00000-of-00001.parquet").write_bytes(b"cut")
    server.asked.clear()
    fetch(wanted(tmp_path))
    assert [path.rpartition("/")[0][-7:] for path in server.fetched()] == ["VOC2007"] and below(tmp_path) == found
    (tmp_path / "eval_images/VOC2007/1.png").unlink()
    server.asked.clear()
    fetch(wanted(tmp_path))
    assert [path[-10:] for path in server.fetched()] == ["images.zip"] and below(tmp_path) == found


def test_a_folder_stays_at_its_commit_until_another_is_asked_for(server: Hub, tmp_path: Path) -> None:
    first = server.heads[EVAL]
    fetch(wanted(tmp_path))
    files = eval_files()
    files["VOC2007/test-00000-of-00001.parquet"] = files["N24News/test-00000-of-00001.parquet"]
    second = server.publish(EVAL, files)
    server.asked.clear()
    assert fetch(wanted(tmp_path)).plan.commits[EVAL] == first and not server.asked
    assert fetch(wanted(tmp_path), "main").plan.commits[EVAL] == second
    assert [path[-35:] for path in server.fetched()] == ["VOC2007/test-00000-of-00001.parquet"]
    assert fetch(wanted(tmp_path), first).plan.commits[EVAL] == first


def test_parts_of_files_that_are_no_longer_listed_are_removed(server: Hub, tmp_path: Path) -> None:
    (tmp_path / ".fetch").mkdir()
    for name in (f"sha256-{'0' * 64}.part", f"git-{'0' * 40}.archive", ".state.json.12345678.tmp"):
        (tmp_path / ".fetch" / name).write_bytes(b"half")
    fetch(wanted(tmp_path))
    assert {path.name for path in (tmp_path / ".fetch").iterdir()} == {".lock", "state.json"}


def test_two_runs_into_one_folder_do_not_meet(server: Hub, tmp_path: Path) -> None:
    held = (
        "from pathlib import Path; from vlm2vec.io import run_lock\n"
        f"with run_lock(Path({str(tmp_path / '.fetch')!r})): print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"pid {holder.pid}"):
        fetch(wanted(tmp_path))
    holder.communicate("\n")
    with run_lock(tmp_path / ".fetch"):
        pass


# -- disk --------------------------------------------------------------------------------------------------------------------------------


def test_room_is_checked_before_the_first_byte(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    needed = preview(wanted(tmp_path)).needed
    sizes = {name: len(data) for name, data in eval_files().items()}
    rows = sum(size for name, size in sizes.items() if name.endswith(".parquet"))
    assert needed == rows + sizes["images.zip"] + int(sizes["images.zip"] * 1.1 * 2 / 36)
    with pytest.raises(EnvError, match=r"fetching mmeb-eval needs .* kB, 1 kB are free; choose another folder with --to, or fewer sets"):
        fetch(wanted(tmp_path))
    assert not server.fetched()


def test_room_for_several_archives_is_that_of_the_worst_moment(server: Hub, tmp_path: Path) -> None:
    server.publish(TRAIN, train_files())
    sizes = {name: len(data) for name, data in train_files().items()}
    rows = sum(sizes[f"{name}/original-00000-of-00001.parquet"] for name in SETS)
    first, second = (sizes[f"images_zip/{name}.zip"] for name in SETS)
    plan = preview(wanted(tmp_path, dataset="mmeb-train"))
    assert plan.needed == rows + int(first * 1.1) + int(second * 1.1) + second
    kept = preview(wanted(tmp_path, dataset="mmeb-train", keep_archives=True))
    assert kept.needed == plan.needed + first


@pytest.mark.parametrize("point", ["fetched", "unpacked"])
def test_a_disk_that_fills_up_is_said_and_gone_on_with(point: str, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_FAULT", f"{point}:2:enospc")
    with pytest.raises(EnvError, match=r"No space left on device \(needs at least [\d,]+ bytes, [\d,]+ bytes free\)"):
        fetch(wanted(tmp_path))
    monkeypatch.delenv("VLM2VEC_FAULT")
    fetch(wanted(tmp_path))
    assert len(below(tmp_path)) == 8
