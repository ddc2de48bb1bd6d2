"""What goes wrong between a Hub and a disk: broken connections, refusals, wrong bytes, kills at every point; and tokens stay secret."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from tests.hub_data import BIG, EVAL, TOKEN, below, connect, eval_files, png, wanted, zipped
from tests.hub_server import Failure, Hub
from vlm2vec import remote
from vlm2vec.cli import main
from vlm2vec.data import hub
from vlm2vec.data.fetch import fetch, preview
from vlm2vec.errors import DataError, EnvError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as running:
        connect(running, monkeypatch, tmp_path)
        running.publish(EVAL, eval_files())
        yield running


# -- a bad network -----------------------------------------------------------------------------------------------------------------------


def big_files() -> dict[str, bytes]:
    """An archive of several blocks."""
    return {**eval_files(), "images.zip": zipped({"VOC2007/0.png": png(0), "VOC2007/1.png": png(1), "VOC2007/sub/2.png": BIG})}


def test_a_connection_that_breaks_is_gone_on_with(server: Hub, tmp_path: Path) -> None:
    server.publish(EVAL, big_files())
    server.failures += [Failure("images.zip", after=200_000), Failure("images.zip", after=100_000)]
    fetch(wanted(tmp_path, "VOC2007"))
    assert below(tmp_path)["eval_images/VOC2007/sub/2.png"] == BIG
    ranges = [asked.range for asked in server.asked if asked.path.endswith("images.zip")]
    assert ranges[0] == "" and len(ranges) == 3
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges[1:]]
    assert 0 < starts[0] <= 200_000 and starts[0] < starts[1]


def test_a_server_without_ranges_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(ranges=False) as running:
        connect(running, monkeypatch, tmp_path)
        running.publish(EVAL, big_files())
        running.failures.append(Failure("images.zip", after=200_000))
        fetch(wanted(tmp_path / "data", "VOC2007"))
    assert sum(path.endswith("images.zip") for path in running.fetched()) == 2
    assert below(tmp_path / "data")["eval_images/VOC2007/sub/2.png"] == BIG


@pytest.mark.parametrize("place", ["/revision/", "N24News", "images.zip"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_waited_for(
    place: str, status: int, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(remote, "WAITS", (1, 2, 4))
    server.failures.append(Failure(place, status, times=2, headers={"Retry-After": "7"} if status == 429 else {}, error="busy, come back"))
    fetch(wanted(tmp_path))
    assert slept == ([7, 7] if status == 429 else [1, 2]) and f"{status} busy, come back; trying again" in caplog.text
    assert len(below(tmp_path)) == 8


def test_passing_failures_of_the_list_are_waited_for_by_the_client(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=slept.append))
    server.failures.append(Failure("/tree/", 503, times=2))
    fetch(wanted(tmp_path))
    assert slept == [1, 2]
    server.failures.append(Failure("/tree/", 503, times=99, error="maintenance"))
    with pytest.raises(EnvError, match="503 maintenance"):
        fetch(wanted(tmp_path / "other"))


def test_a_failure_that_stays_ends_with_code_4_and_the_way_on(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.failures.append(Failure("images.zip", 503, times=99, error="maintenance"))
    assert main(["data", "get", "mmeb-eval", "--to", str(tmp_path), "--subset", "VOC2007"]) == 4
    said = capsys.readouterr().err
    assert "503 maintenance" in said and "run the same command again later" in said and "images.zip" in said
    server.failures.clear()
    fetch(wanted(tmp_path, "VOC2007"))


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {}, "set HF_TOKEN"),
        (401, {"X-Error-Code": "RepoNotFound"}, "set HF_TOKEN"),
        (403, {}, "accept its terms"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept its terms"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "check the name and the revision"),
        (404, {}, "check the name and the revision"),
        (410, {}, "refused"),
    ],
)
@pytest.mark.parametrize("place", ["/revision/", "images.zip"])
def test_a_refusal_ends_at_once_with_the_words_of_the_server(
    place: str, status: int, headers: dict[str, str], words: str, server: Hub, tmp_path: Path
) -> None:
    server.failures.append(Failure(place, status, times=99, headers=headers, error="the words of the server"))
    with pytest.raises(DataError, match="the words of the server") as error:
        fetch(wanted(tmp_path))
    assert words in str(error.value) and EVAL in str(error.value)
    assert sum(place in asked.path for asked in server.asked) == 1


def test_a_gated_repository_opens_to_the_token_that_it_knows(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated[EVAL] = "hf_another"
    with pytest.raises(DataError, match=r"403 Access to this dataset is restricted.*accept its terms on the Hub and set HF_TOKEN"):
        fetch(wanted(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    fetch(wanted(tmp_path))


def test_a_revision_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MMEB-eval@no-such-branch: not found \(404 Invalid rev id\)"):
        fetch(wanted(tmp_path), "no-such-branch")


def test_offline_and_missing(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        fetch(wanted(tmp_path))
    assert not server.asked


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as running:
        connect(running, monkeypatch, tmp_path)
    with pytest.raises(EnvError, match="no connection"):
        fetch(wanted(tmp_path / "data"))


# -- wrong content -----------------------------------------------------------------------------------------------------------------------


def test_wrong_bytes_are_fetched_once_more_and_then_refused(server: Hub, tmp_path: Path) -> None:
    path = "VOC2007/test-00000-of-00001.parquet"
    data = eval_files()[path]
    server.instead[path] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(DataError, match=r"the bytes that came are not the file: expected sha256:\w{64}, got sha256:"):
        fetch(wanted(tmp_path, "VOC2007"))
    assert len(server.fetched()) == 2 and not below(tmp_path) and not list((tmp_path / ".fetch").glob("*.part"))
    del server.instead[path]
    fetch(wanted(tmp_path, "VOC2007"))


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data + b"more"], ids=["shorter", "longer"])
def test_bytes_of_another_number(change: Callable[[bytes], bytes], server: Hub, tmp_path: Path) -> None:
    path = "images.zip"
    server.instead[path] = change(eval_files()[path])
    if len(server.instead[path]) > len(eval_files()[path]):  # what lies beyond the end is not read
        fetch(wanted(tmp_path))
        return
    with pytest.raises((DataError, EnvError), match="images.zip"):
        fetch(wanted(tmp_path))
    assert not any("images" in name for name in below(tmp_path))


def test_files_outside_of_lfs_are_checked_by_their_git_blob(server: Hub, tmp_path: Path) -> None:
    file = hub.RemoteFile(EVAL, server.heads[EVAL], "README.md", 5, "git:" + "0" * 40)
    listed = next(entry for entry in hub.list_files(EVAL, server.heads[EVAL]) if entry.path == "README.md")
    bar = SimpleNamespace(update=lambda count: None)
    hub.fetch_file(listed, tmp_path / "README.md", tmp_path / "parts", bar)
    assert (tmp_path / "README.md").read_bytes() == b"words" and hub.matches(tmp_path / "README.md", listed)
    with pytest.raises(DataError, match="expected git:0000"):
        hub.fetch_file(file, tmp_path / "again", tmp_path / "parts", bar)


@pytest.mark.parametrize("path", ["../../x.parquet", "/etc/x.parquet", "VOC2007/test-/../../x.parquet"])
def test_a_server_cannot_choose_where_files_go(path: str, server: Hub, tmp_path: Path) -> None:
    server.publish(EVAL, {path: b"x", **eval_files()})
    with pytest.raises(DataError, match="the server lists"):
        fetch(wanted(tmp_path))


def test_a_repository_without_the_set_or_the_archive(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rows of CIRR, split 'test' \(CIRR/test-\*.parquet\); it holds nothing for it"):
        fetch(wanted(tmp_path, "CIRR"))
    server.publish(EVAL, {name: data for name, data in eval_files().items() if name != "images.zip"})
    with pytest.raises(DataError, match=r"no images.zip at this revision; it holds no archive"):
        fetch(wanted(tmp_path), "main")


def test_an_archive_of_another_layout_is_said(server: Hub, tmp_path: Path) -> None:
    server.publish(EVAL, {**eval_files(), "images.zip": zipped({"other/place/0.png": png(1)})})
    with pytest.raises(DataError, match=r"holds no picture of the 3 that the rows name, e.g. VOC2007/0.png"):
        fetch(wanted(tmp_path, "VOC2007"))


def test_pictures_that_the_archive_lacks_are_counted(server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.publish(EVAL, {**eval_files(), "images.zip": zipped({"VOC2007/0.png": png(1)})})
    fetch(wanted(tmp_path, "VOC2007"))
    assert "2 of 3 pictures that the rows name are not in it" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mmeb-evl"], "did you mean mmeb-eval"),
        (["mmeb-eval", "--subset", "ImageNet_1K"], "did you mean ImageNet-1K"),
        (["mmeb-eval", "--split", "original"], "there are: test and all"),
        (["mini", "--subset", "CIRR"], "--subset does not apply"),
    ],
)
def test_what_there_is_not(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "get", *words]) == 2
    assert message in capsys.readouterr().err


# -- kills -------------------------------------------------------------------------------------------------------------------------------


def test_killed_at_every_point_it_finishes_with_the_same_files(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Callable[..., int]
) -> None:
    """Every write, flush, rename and block in turn; the second run goes on."""
    whole = wanted(tmp_path / "whole")
    fetch(whole)
    points, code = 0, -9
    while code == -9:
        folder = tmp_path / f"killed-{points}"
        request = replace(whole, folder=folder)
        monkeypatch.setenv("VLM2VEC_FAULT", f"*:{points + 1}:kill")
        code = forked(fetch, request)
        monkeypatch.delenv("VLM2VEC_FAULT")
        fetch(request)
        assert below(folder) == below(tmp_path / "whole"), f"killed at point {points + 1}"
        assert {path.name for path in (folder / ".fetch").iterdir()} == {".lock", "state.json"}
        points += 1
    assert code == 0 and points > 20


def test_a_killed_download_goes_on_where_it_was(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Callable[..., int]
) -> None:
    server.publish(EVAL, big_files())
    monkeypatch.setenv("VLM2VEC_FAULT", "fetched:5:kill")  # a piece in the middle of the archive
    assert forked(fetch, wanted(tmp_path, "VOC2007")) == -9
    monkeypatch.delenv("VLM2VEC_FAULT")
    have = sum(path.stat().st_size for path in (tmp_path / ".fetch").glob("*.part"))
    assert 0 < have < 500_000 and preview(wanted(tmp_path, "VOC2007")).begun == have
    server.asked.clear()
    fetch(wanted(tmp_path, "VOC2007"))
    assert [(asked.path[-10:], asked.range) for asked in server.asked] == [("images.zip", f"bytes={have}-")]


# -- tokens ------------------------------------------------------------------------------------------------------------------------------


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from vlm2vec.cli import main; sys.exit(main())"
    variables = {**os.environ, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=variables, timeout=120)


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line in processes of its own: refused with the token in the server's words, killed, and run to the end."""
    with Hub(cdn=True) as running:
        connect(running, monkeypatch, tmp_path)
        running.publish(EVAL, big_files())
        running.gated[EVAL] = TOKEN
        running.failures.append(Failure("/revision/", 403, error=f"token {TOKEN} may not, see http://x/y?signature=secret"))
        command = ["--verbose", "data", "get", "mmeb-eval", "--to", str(tmp_path / "data"), "--subset", "VOC2007"]
        refused = run(*command)
        killed = run(*command, VLM2VEC_FAULT="fetched:3:kill")
        done = run(*command)
        asked = list(running.asked)
    assert (refused.returncode, killed.returncode, done.returncode) == (1, -9, 0), refused.stderr + done.stderr
    assert "token <token> may not, see http://x/y" in refused.stderr and "is complete in" in done.stdout
    for text in (*(getattr(one, stream) for one in (refused, killed, done) for stream in ("stdout", "stderr")), str(below(tmp_path))):
        assert TOKEN not in text and "secret" not in text
    assert TOKEN not in (tmp_path / "data/.fetch/state.json").read_text()
    assert {one.authorization for one in asked if one.host == "cdn"} == {""}
    assert {one.authorization for one in asked if one.host == "hub" and EVAL in one.path} == {f"Bearer {TOKEN}"}
