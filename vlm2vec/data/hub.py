"""Files of a dataset repository on the Hub: which there are at a commit, and each one fetched whole and checked.

huggingface_hub carries the requests, the endpoint (HF_ENDPOINT), the token (HF_TOKEN) and being offline (HF_HUB_OFFLINE). What it does not
do is go on with half a file after a kill; here the half lies under the name of its checksum, and only the rest is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from vlm2vec.data.archives import unsafe
from vlm2vec.errors import DataError, EnvError
from vlm2vec.io.disk import DiskErrors
from vlm2vec.io.faults import fault
from vlm2vec.log import get_logger
from vlm2vec.remote import FAILURES, TIMEOUT, Patience, explained, patiently

BLOCK = 1 << 20  # bytes read from a file at once
PIECE = 1 << 16  # bytes of a download written at once: what a broken connection loses at most

_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
_logger = get_logger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file at a commit. `checksum` is "sha256:<hex>" of its bytes, or "git:<hex>", the id of the git blob they make."""

    repository: str
    commit: str
    path: str
    bytes: int
    checksum: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit[:12]}:{self.path}"


def commit_of(repository: str, revision: str) -> str:
    """The commit that a branch, tag or commit of a dataset repository stands for."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    what = f"dataset {repository}@{revision}"
    found = patiently(what, lambda: api.dataset_info(repository, revision=revision, timeout=TIMEOUT).sha)
    if not found:
        raise DataError(f"{what}: the server names no commit")
    return found


def list_files(repository: str, commit: str) -> list[RemoteFile]:
    """All files of a dataset repository at a commit."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:  # this call waits and tries again by itself
        tree = list(api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset"))
    except FAILURES as error:
        raise explained(error, f"dataset {repository}@{commit}") from None
    return [_remote(repository, commit, entry) for entry in tree if isinstance(entry, RepoFile)]


def _remote(repository: str, commit: str, file: RepoFile) -> RemoteFile:
    """Path and checksum become names of files here, so neither may be anything else."""
    checksum = stated_checksum(file)
    if unsafe(file.path) or not _CHECKSUM.fullmatch(checksum):
        raise DataError(f"{repository}@{commit}: the server lists {file.path[:200]!a} with checksum {checksum[:80]!a}; refused")
    return RemoteFile(repository, commit, file.path, file.size, checksum)


def stated_checksum(file: RepoFile) -> str:
    """What the server says of a file's bytes, in the form of RemoteFile.checksum."""
    return f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether `path` holds exactly the bytes of `file`."""
    return path.is_file() and path.stat().st_size == file.bytes and checksum_of(path, file.checksum) == file.checksum


def checksum_of(path: Path, like: str) -> str:
    """The checksum of a file, of the same kind as `like`."""
    kind = like.partition(":")[0]
    state = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            state.update(block)
    return f"{kind}:{state.hexdigest()}"


# -- fetching ----------------------------------------------------------------------------------------------------------------------------


def partial_path(file: RemoteFile, folder: Path) -> Path:
    """Where `fetch_file` keeps what has come of a file so far."""
    return folder / f"{file.checksum.replace(':', '-')}.part"


def fetch_file(file: RemoteFile, to: Path, parts: Path, progress: Any) -> None:
    """Fetch `file` into `to`, going on from what lies in the folder `parts`, and check it; `progress` is a bar over bytes.

    Raises DataError with the server's words when it refuses (401, 403, 404), when there is no network and when the bytes are wrong twice,
    EnvError when the server or the disk fails for good.
    """
    part = partial_path(file, parts)
    with DiskErrors(to, parts, lambda: file.bytes):
        parts.mkdir(parents=True, exist_ok=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            _fetch_part(file, part, progress)
            found = checksum_of(part, file.checksum)
            if found == file.checksum:
                break
            part.unlink()
            progress.update(-file.bytes)
            if attempt == 2:
                raise DataError(f"{file}: the bytes that came are not the file: expected {file.checksum}, got {found}; nothing was kept")
            _logger.warning("%s: the bytes that came have another checksum; fetching it once more", file)
        fault("before-rename", file.path)
        os.replace(part, to)


def _fetch_part(file: RemoteFile, part: Path, progress: Any) -> None:
    """Append what is missing, again and again until all is there or there is no progress."""
    patience = Patience(str(file))
    have = _size(part)
    progress.update(have)
    while not part.exists() or have < file.bytes:
        try:
            _append(file, part, have, progress)
            problem: Exception | None = None
        except FAILURES as error:
            problem = error
        before, have = have, _size(part)
        if have < file.bytes:
            patience.wait(problem or EnvError(f"the server ended after {have:,} of {file.bytes:,} bytes"), progressed=have > before)


def _append(file: RemoteFile, part: Path, have: int, progress: Any) -> None:
    url = hf_hub_url(file.repository, file.path, repo_type="dataset", revision=file.commit, endpoint=os.environ.get("HF_ENDPOINT"))
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and have:  # the server knows no ranges and starts over
            progress.update(-have)
            have = 0
        with part.open("ab") as sink:
            sink.truncate(have)
            for block in response.iter_bytes(PIECE):
                block = block[: file.bytes - have]
                sink.write(block)
                sink.flush()  # what has come survives a kill
                have += len(block)
                progress.update(len(block))
                fault("fetched", file.path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
