"""Folders onto a Hub: one commit or none, whatever breaks and wherever the process is killed; and what must not be sent is refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ended, start
from tests.push_server import TOKEN, Action, ModelHub
from vlm2vec import io, remote
from vlm2vec.cli import main
from vlm2vec.encoder import Encoder
from vlm2vec.errors import DataError, EnvError, InputError, ManifestError, NonFiniteError, Vlm2VecError
from vlm2vec.export import export
from vlm2vec.export.record import RESULTS
from vlm2vec.push import Pushed, complete, licence_of, push, push_export
from vlm2vec.samples import picture

NAME = "ann/embedder"
VERSIONS = {"old": (1.0, ("model.safetensors", "extra.json")), "new": (2.0, ("model.safetensors", "1_Pooling/config.json"))}


def folder(at: Path, version: str, results: bool = True) -> Path:
    """A small folder as an export leaves it: the versions differ in weights, card and in which files there are."""
    value, names = VERSIONS[version]
    with io.publishing(at / version) as staging:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                save_file({"weight": torch.full((4, 4), value)}, staging / name)
            else:
                io.write_json(staging / name, {"value": value})
        (staging / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {version}\n", encoding="utf-8")
        if results:
            io.write_json(staging / RESULTS, {"score": value})
    return at / version


def files(at: Path, version: str) -> dict[str, Path]:
    """The files of a version, as they are pushed."""
    return below(at / version if (at / version).exists() else folder(at, version))


def below(at: Path) -> dict[str, Path]:
    return {path.relative_to(at).as_posix(): path for path in at.rglob("*") if path.is_file()}


def content(at: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in below(at).items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelHub]:
    with ModelHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(remote, "WAITS", (0, 0))
        yield running


def failing(hub: ModelHub, at: int, action: Action, times: int = 1) -> None:
    hub.asked.clear()
    hub.action = lambda number, what: action if at <= number < at + times else None


def steady(hub: ModelHub) -> None:
    hub.asked.clear()
    hub.action = lambda number, what: None


def test_the_branch_holds_the_folder_and_a_second_push_changes_nothing(hub: ModelHub, tmp_path: Path) -> None:
    done = push(files(tmp_path, "old"), NAME)
    assert hub.files(NAME) == content(tmp_path / "old") and len(hub.repositories[NAME].branches["main"]) == 2
    assert done.url == f"{hub.url}/{NAME}/tree/main" and done.commit == hub.repositories[NAME].head("main")
    assert set(done.changes.add) == set(content(tmp_path / "old")) and not done.changes.remove
    hub.asked.clear()
    again = push(files(tmp_path, "old"), NAME)
    assert again == Pushed(done.commit, done.url, again.changes) and not again.changes
    assert not [what for what in hub.asked if not what.startswith(("GET", "HEAD"))]


def test_what_an_earlier_push_put_there_is_removed_with_the_same_commit(hub: ModelHub, tmp_path: Path) -> None:
    push(files(tmp_path, "old"), NAME)
    done = push(files(tmp_path, "new"), NAME)
    assert hub.files(NAME) == content(tmp_path / "new") and len(hub.repositories[NAME].branches["main"]) == 3
    assert done.changes.remove == ("extra.json",)


def test_files_of_others_are_named_and_removed_only_on_request(hub: ModelHub, tmp_path: Path) -> None:
    hub.create(NAME, files={"model-00001-of-00002.safetensors": b"x", "README.md": b"# theirs"})
    with pytest.raises(InputError, match=r"1 files that no push put there \(model-00001-of-00002.safetensors\)"):
        push(files(tmp_path, "new"), NAME)
    assert hub.files(NAME)["README.md"] == b"# theirs"
    push(files(tmp_path, "new"), NAME, replace=True)
    assert hub.files(NAME) == content(tmp_path / "new")


def test_a_branch_is_made_and_main_stays(hub: ModelHub, tmp_path: Path) -> None:
    push(files(tmp_path, "old"), NAME)
    push(files(tmp_path, "new"), NAME, revision="trial")
    assert (hub.files(NAME), hub.files(NAME, "trial")) == (content(tmp_path / "old"), content(tmp_path / "new"))


def test_a_dry_run_asks_and_changes_nothing(hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = push(files(tmp_path, "old"), NAME, dry_run=True)
    assert done.commit is None and len(done.changes.add) == 5 and not hub.repositories
    assert all(what.startswith("GET") for what in hub.asked)


def test_private_is_private(hub: ModelHub, tmp_path: Path) -> None:
    push(files(tmp_path, "old"), NAME, private=True)
    assert hub.repositories[NAME].private
    hub.repositories[NAME].private = False
    with pytest.raises(InputError, match="is public"):
        push(files(tmp_path, "new"), NAME, private=True)
    assert hub.files(NAME) == content(tmp_path / "old")


# -- what goes wrong


def requests_of_a_push(hub: ModelHub, tmp_path: Path) -> int:
    """How many requests it takes to put the new version over the old one."""
    push(files(tmp_path, "old"), "ann/trial")
    hub.asked.clear()
    push(files(tmp_path, "new"), "ann/trial")
    del hub.repositories["ann/trial"]
    hub.blobs.clear()
    return len(hub.asked)


@pytest.mark.parametrize("actions", [(429, 500, 503), pytest.param(("lost",), marks=pytest.mark.slow), ("unheard",)], ids=str)
def test_what_passes_is_tried_again(actions: tuple[Action, ...], hub: ModelHub, tmp_path: Path) -> None:
    for at in range(1, 1 + requests_of_a_push(hub, tmp_path)):
        hub.blobs.clear()
        steady(hub)
        push(files(tmp_path, "old"), f"ann/{at}")
        failing(hub, at, actions[at % len(actions)])
        push(files(tmp_path, "new"), f"ann/{at}")
        assert hub.files(f"ann/{at}") == content(tmp_path / "new"), hub.asked
        assert len(hub.repositories[f"ann/{at}"].branches["main"]) == 3  # also where the answer to the commit was lost


@pytest.mark.parametrize("action", [pytest.param("lost", marks=pytest.mark.slow), "unheard"])
def test_killed_at_every_request_the_branch_is_old_or_new(action: Action, hub: ModelHub, tmp_path: Path) -> None:
    """kill -9 when a request arrives, before or after the server acts on it; then the same push again, and once more."""
    old, new = folder(tmp_path, "old"), folder(tmp_path, "new")
    seen = set()
    for at in range(1, 1 + requests_of_a_push(hub, tmp_path)):
        name = f"ann/{at}"
        hub.blobs.clear()
        steady(hub)
        push(below(old), name)
        pids: list[int] = []

        def killing(number: int, what: str, at: int = at, pids: list[int] = pids) -> Action:
            if number < at:
                return None
            while not pids:
                time.sleep(0.001)
            os.kill(pids[0], signal.SIGKILL)
            return action

        hub.asked.clear()
        hub.action = killing
        pids.append(start(push, below(new), name))
        assert ended(pids[0]) == -signal.SIGKILL
        steady(hub)
        left = hub.files(name)
        assert left in (content(old), content(new)), hub.asked
        seen.add(left == content(new))
        sent = set(hub.blobs)
        push(below(new), name)
        assert hub.files(name) == content(new)
        assert not [what for what in hub.asked if what.startswith("PUT") and what.rpartition("/")[2] in sent]  # gone on, not begun anew
        assert not push(below(new), name).changes
    assert False in seen and (True in seen) == (action == "unheard")


def test_a_server_that_stays_down_ends_with_its_words(hub: ModelHub, tmp_path: Path) -> None:
    failing(hub, 1, 503, times=10**6)
    with pytest.raises(EnvError, match="503 made up.*it goes on where it stopped"):
        push(files(tmp_path, "old"), NAME)


@pytest.mark.parametrize(("token", "said"), [("hf_wrong", "access refused"), ("", "no token")])
def test_without_the_right_to_write(token: str, said: str, hub: ModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(Vlm2VecError, match=said) as refused:
        push(files(tmp_path, "old"), NAME)
    assert refused.value.exit_code == 2 and (not token or token not in str(refused.value)) and not hub.repositories


def test_somebody_else_commits_meanwhile(hub: ModelHub, tmp_path: Path) -> None:
    push(files(tmp_path, "old"), NAME)

    def meddling(number: int, what: str) -> Action:
        if what.endswith("/commit/main"):
            hub.repositories[NAME].commit("main", {"README.md": b"theirs"})
        return None

    hub.action = meddling
    with pytest.raises(EnvError, match="somebody else committed"):
        push(files(tmp_path, "new"), NAME)
    assert hub.files(NAME) == {"README.md": b"theirs"}


def test_a_name_that_is_none(hub: ModelHub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Repo id must"):
        push(files(tmp_path, "old"), "ann/em/bedder")


# -- exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature as `vlm2vec export` writes it."""
    to = tmp_path_factory.mktemp("made") / "exported"
    export("builtin/tiny-qwen2_vl", to, check=False)
    return to


def test_an_export_goes_there_and_comes_back(hub: ModelHub, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(exported), NAME, "--licence", "mit", "--without-results"]
    assert main([*words, "--dry-run"]) == 0 and "nothing was sent" in capsys.readouterr().out and not hub.repositories
    assert main(words) == 0
    assert f"sent to {hub.url}/{NAME}/tree/main" in capsys.readouterr().out
    assert b'from_pretrained("ann/embedder")' in hub.files(NAME)["README.md"]
    assert {**hub.files(NAME), "README.md": b""} == {**content(exported), "README.md": b""}
    assert main(words) == 0 and "already there" in capsys.readouterr().out
    commit = hub.repositories[NAME].head("main")
    items = ["a red apple", picture(64, 48)]
    for revision in (None, commit):
        back = Encoder.from_pretrained(NAME, revision=revision, device="cpu")
        assert torch.equal(back.encode(items), Encoder.from_pretrained(exported, device="cpu").encode(items))


def test_the_licence_of_the_base_is_carried_over(hub: ModelHub, exported: Path) -> None:
    settings = io.read_json(exported / "vlm2vec.json")
    assert settings["export"]["base"] is None
    with pytest.raises(InputError, match="--licence"):
        push_export(exported, NAME, without_results=True)
    hub.create("owner/base")
    hub.licences["owner/base"] = "cc-by-4.0"
    assert licence_of("owner/base") == "cc-by-4.0"
    hub.create("owner/silent")
    with pytest.raises(InputError, match="owner/silent"):
        licence_of("owner/silent")


# -- what may be sent


def test_only_a_whole_export_is_sent(tmp_path: Path) -> None:
    at = folder(tmp_path, "old")
    complete(at)
    (at / "notes.txt").write_text("private")
    with pytest.raises(InputError, match="notes.txt: not written by the export"):
        complete(at)
    (at / "notes.txt").unlink()
    (at / "extra.json").write_text("{}")
    with pytest.raises(ManifestError, match="extra.json"):
        complete(at)
    with pytest.raises(InputError, match="no such folder"):
        complete(tmp_path / "none")
    with pytest.raises(ManifestError, match="manifest missing"):
        complete(tmp_path)


def test_results_are_asked_for(tmp_path: Path) -> None:
    at = folder(tmp_path, "old", results=False)
    with pytest.raises(InputError, match="--without-results"):
        complete(at)
    complete(at, without_results=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    with io.publishing(tmp_path / "bad") as staging:
        save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, value]).to(torch.bfloat16)}, staging / "model.safetensors")
    with pytest.raises(NonFiniteError, match="bad holds NaN or infinity"):
        complete(tmp_path / "bad", without_results=True)
