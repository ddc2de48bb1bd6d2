"""An exported folder onto the Hub: all of it in one commit, or nothing.

What is large goes first, under the names of its checksums, where nobody sees it; the commit that names all files comes last, in one
request. So a kill at any moment leaves the old version or the new one. Every attempt starts from what the repository holds: what is there
already is not sent again, and a commit whose answer was lost is found done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_token
from safetensors import safe_open

from vlm2vec.data.hub import checksum_of, stated_checksum
from vlm2vec.errors import EnvError, InputError, ManifestError, NonFiniteError
from vlm2vec.export.record import RESULTS
from vlm2vec.hub_card import model_card
from vlm2vec.io import MANIFEST, read_json, verify_manifest
from vlm2vec.remote import patiently
from vlm2vec.verify import CARD, export_settings

THEIRS = (".gitattributes",)  # what the Hub itself puts into a repository
CHANGED_MEANWHILE = 412
Files = Mapping[str, Path]  # path in the repository -> file here


@dataclass(frozen=True)
class Remote:
    """A branch of a repository: its commit, None where there is no repository or branch yet, and the checksums of its files."""

    commit: str | None
    files: Mapping[str, str]


@dataclass(frozen=True)
class Changes:
    """What makes a branch equal to a folder: files to `add` with their bytes, and paths to `remove`."""

    add: Mapping[str, int]
    remove: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.remove)


@dataclass(frozen=True)
class Pushed:
    """The commit that holds the folder, where people see it, and what it took. `commit` is None after a dry run on a new repository."""

    commit: str | None
    url: str
    changes: Changes


def push_export(
    folder: Path, repository: str, *, licence: str | None = None, without_results: bool = False, dry_run: bool = False, **options: Any
) -> Pushed:
    """Push what `vlm2vec export` wrote, its README made into the model card of `repository`. `options` are those of `push`.

    The licence is by default that of the base on the Hub. Raises what `complete` and `push` raise, InputError where no licence is known.
    """
    base = export_settings(folder)["export"]["base"]
    files = complete(folder, without_results)
    with TemporaryDirectory() as aside:
        card = Path(aside) / CARD
        card.write_text(model_card(folder, repository, licence or licence_of(base)), encoding="utf-8")
        return push({**files, CARD: card}, repository, dry_run=dry_run, **options)


def licence_of(base: str | None) -> str:
    """What the card of a base on the Hub says. Raises InputError where it says nothing, or where there is no such base."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    about = patiently(f"licence of {base}", lambda: api.model_info(base).card_data) if base else None
    told = about.get("license") if about else None
    if not told:
        raise InputError(f"nothing says under which licence the base {base or 'of this model'} stands; say it with --licence")
    return str(told)


def push(
    files: Files, repository: str, *, revision: str = "main", private: bool = False, replace: bool = False, dry_run: bool = False
) -> Pushed:
    """Make the branch `revision` of the model repository `repository` hold exactly `files`, in one commit.

    The repository and the branch are made where they are missing. What an earlier push put there and `files` lacks is removed; what others
    put there only with `replace`, else InputError names it. Raises DataError with the server's words when it refuses, EnvError when it
    fails for good or somebody else committed meanwhile; the same call goes on then.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    what = f"model {repository}@{revision}"
    if not dry_run and not get_token():
        raise InputError(f"{what}: no token; make one that may write at https://huggingface.co/settings/tokens and set HF_TOKEN to it")
    return patiently(what, lambda: _attempt(api, files, repository, revision, private, replace, dry_run), "write", (RuntimeError,))


def _attempt(api: HfApi, files: Files, repository: str, revision: str, private: bool, replace: bool, dry_run: bool) -> Pushed:
    what, url = f"model {repository}@{revision}", f"{api.endpoint}/{repository}/tree/{revision}"
    remote = _remote(api, repository, revision, private)
    if remote.commit is None and not dry_run:
        _make(api, repository, revision, private)
        remote = _remote(api, repository, revision, private)
    changes = compare(files, remote, _ours(api, repository, remote), replace, what)
    commit = _commit(api, files, repository, revision, remote, changes) if changes and not dry_run else remote.commit
    return Pushed(commit, url, changes)


def compare(files: Files, remote: Remote, ours: frozenset[str], replace: bool, what: str) -> Changes:
    """What must change for `remote` to hold `files`; `ours` are paths that an earlier push put there."""
    add = {
        name: path.stat().st_size
        for name, path in files.items()
        if name not in remote.files or checksum_of(path, remote.files[name]) != remote.files[name]
    }
    gone = sorted(remote.files.keys() - files.keys() - set(THEIRS))
    strangers = [name for name in gone if name not in ours]
    if strangers and not replace:
        named = ", ".join(strangers[:5])
        raise InputError(f"{what} holds {len(strangers)} files that no push put there ({named}); --replace removes them")
    return Changes(add, tuple(gone))


def complete(folder: Path, without_results: bool = False) -> dict[str, Path]:
    """The files of `folder`, which an export wrote and which may be shown.

    Raises ManifestError for a damaged file, NonFiniteError for weights with a NaN or infinity, InputError for a file that the manifest does
    not list and for missing results.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that vlm2vec export wrote")
    try:
        verify_manifest(folder)
    except ManifestError as error:
        raise ManifestError(f"{error}; write the folder again with vlm2vec export") from error
    listed = read_json(folder / MANIFEST)["files"].keys() | {MANIFEST}
    strangers = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    strangers = [name for name in strangers if name not in listed]
    if strangers:
        raise InputError(f"{folder}: {', '.join(strangers[:5])}: not written by the export, so nobody checked it; move it away")
    if RESULTS not in listed and not without_results:
        raise InputError(f"{folder}: no {RESULTS}, so its card has no scores; export with --results, or say --without-results")
    for file in sorted(folder.glob("*.safetensors")):
        _require_finite(file)
    return {name: folder / name for name in sorted(listed)}


def _require_finite(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{file}: {name} holds NaN or infinity; nothing was sent")


# -- the repository


def _remote(api: HfApi, repository: str, revision: str, private: bool) -> Remote:
    """What the branch holds. Raises InputError where everybody can read what is to be `private`."""
    try:
        info = api.repo_info(repository, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return Remote(None, {})
    if private and not info.private:
        raise InputError(f"model {repository} is public; make it private in its settings on the Hub, or push without --private")
    tree = api.list_repo_tree(repository, recursive=True, revision=info.sha)
    files = {file.path: stated_checksum(file) for file in tree if isinstance(file, RepoFile)}
    return Remote(info.sha, files)


def _make(api: HfApi, repository: str, revision: str, private: bool) -> None:
    """The repository and the branch; what exists stays as it is."""
    api.create_repo(repository, private=private or None, exist_ok=True)  # None: the default of the owner
    if revision != "main":
        api.create_branch(repository, branch=revision, exist_ok=True)


def _ours(api: HfApi, repository: str, remote: Remote) -> frozenset[str]:
    """Paths that the manifest of an earlier push lists."""
    if MANIFEST not in remote.files:
        return frozenset()
    manifest = read_json(Path(api.hf_hub_download(repository, MANIFEST, revision=remote.commit)))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    return frozenset(files or ()) | {MANIFEST}


def _commit(api: HfApi, files: Files, repository: str, revision: str, remote: Remote, changes: Changes) -> str:
    """Send what must change and name it in one commit on top of `remote`; returns the new commit."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, files[name]) for name in changes.add),
        *(CommitOperationDelete(name) for name in changes.remove),
    ]
    message = f"{len(changes.add)} files written and {len(changes.remove)} removed by vlm2vec push"
    try:
        return api.create_commit(repository, operations, commit_message=message, revision=revision, parent_commit=remote.commit).oid
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == CHANGED_MEANWHILE:
            raise EnvError(f"{repository}@{revision}: somebody else committed while this was sent; look at it, then run again") from None
        raise
