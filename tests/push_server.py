"""The part of the Hub that a push speaks to, on loopback: model repositories, branches, large files, commits; failures on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "secret" * 5
LARGE = (".safetensors", ".png")
FIRST = {".gitattributes": b"*.safetensors filter=lfs\n"}

Action = int | str | None  # a status to answer; "lost": the request never arrives; "unheard": it is carried out and never answered


@dataclass
class Repository:
    """Branches, each the commits on it, and the files of every commit."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        content = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
        name = hashlib.sha1(repr((len(self.trees), content)).encode()).hexdigest()
        self.trees[name] = dict(files)
        self.branches.setdefault(branch, []).append(name)
        return name

    def head(self, revision: str) -> str | None:
        return self.branches[revision][-1] if revision in self.branches else revision if revision in self.trees else None


class ModelHub:
    """`with ModelHub() as hub:` serves. `asked` are method and path of all requests; `action(number, what)` says how one of them fails."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.licences: dict[str, str] = {}  # what the cards of repositories say
        self.asked: list[str] = []
        self.action: Callable[[int, str], Action] = lambda number, what: None
        self.tokens = {TOKEN}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    def __enter__(self) -> ModelHub:
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients of these tests are killed
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a branch, less those that the Hub itself put there."""
        repository = self.repositories[name]
        head = repository.head(revision)
        assert head is not None
        return {path: data for path, data in repository.trees[head].items() if path not in FIRST}

    def create(self, name: str, private: bool = False, files: Mapping[str, bytes] | None = None) -> Repository:
        self.repositories[name] = repository = Repository(private)
        repository.commit("main", {**FIRST, **(files or {})})
        return repository


def blob_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Refused(Exception):
    """A status, the Hub's code for it, and words."""


def _handler(hub: ModelHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes; the second would wait for a delayed answer to the first

        def log_message(self, format: str, *args: Any) -> None:
            """Silence."""

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                hub.asked.append(f"{self.command} {path}")
                action = hub.action(len(hub.asked), hub.asked[-1])
                if action == "lost":
                    self.close_connection = True
                    return
                answer = (action, {}, b'{"error": "made up"}') if isinstance(action, int) else self.answer(path, body)
            if action == "unheard":
                self.close_connection = True
            else:
                self.send(*answer)

        do_POST = do_PUT = do_HEAD = do_GET

        def answer(self, path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            try:
                for pattern, route in ROUTES.items():
                    if found := re.fullmatch(pattern, f"{self.command} {path}"):
                        if self.command in ("POST", "PUT") and "/blob/" not in path:
                            self.authorize()
                        made = route(hub, body, *found.groups())
                        return made if isinstance(made, tuple) else (200, {}, json.dumps(made).encode())
                raise _Refused(404, "EntryNotFound", f"no route for {self.command} {path}")
            except _Refused as refused:
                status, code, words = refused.args
                return status, {"X-Error-Code": code, "X-Error-Message": words}, json.dumps({"error": words}).encode()

        def authorize(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in hub.tokens:
                words = f"token {token} may not write"  # a server that repeats what it was given
                raise _Refused(403 if token else 401, "", words)

        def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


# -- routes: (hub, body, parts of the path) -> what is answered as JSON, or (status, headers, body)


def _repository(hub: ModelHub, name: str) -> Repository:
    if name not in hub.repositories:
        raise _Refused(404, "RepoNotFound", "Repository not found")
    return hub.repositories[name]


def _head(hub: ModelHub, name: str, revision: str) -> str:
    head = _repository(hub, name).head(revision)
    if head is None:
        raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return head


def _info(hub: ModelHub, body: bytes, name: str, revision: str = "main") -> Any:
    head = _head(hub, name, revision)
    repository = hub.repositories[name]
    siblings = [{"rfilename": path} for path in repository.trees[head]]
    card = {"cardData": {"license": hub.licences[name]}} if name in hub.licences else {}
    return {"id": name, "modelId": name, "sha": head, "private": repository.private, "siblings": siblings, "tags": [], **card}


def _tree(hub: ModelHub, body: bytes, name: str, revision: str) -> Any:
    files = hub.repositories[name].trees[_head(hub, name, revision)]
    folders = sorted({path.rpartition("/")[0] for path in files if "/" in path})
    return [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders] + [
        {"type": "file", "path": path, "oid": blob_id(data), "size": len(data)}
        | ({"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}} if path.endswith(LARGE) else {})
        for path, data in files.items()
    ]


def _create(hub: ModelHub, body: bytes) -> Any:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in hub.repositories:
        return 409, {}, json.dumps({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}).encode()
    hub.create(name, bool(asked.get("private")) or asked.get("visibility") == "private")
    return {"url": f"{hub.url}/{name}", "name": name}


def _branch(hub: ModelHub, body: bytes, name: str, branch: str) -> Any:
    repository = _repository(hub, name)
    if branch in repository.branches:
        return 409, {}, b'{"error": "Reference already exists"}'
    repository.branches[branch] = list(repository.branches["main"])
    return {}


def _preupload(hub: ModelHub, body: bytes, name: str, revision: str) -> Any:
    files = hub.repositories[name].trees[_head(hub, name, revision)]
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": blob_id(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
    }


def _batch(hub: ModelHub, body: bytes, name: str) -> Any:
    objects = []
    for wanted in json.loads(body)["objects"]:
        place = {"actions": {"upload": {"href": f"{hub.url}/blob/{wanted['oid']}"}}}
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if wanted["oid"] in hub.blobs else place)})
    return {"transfer": "basic", "objects": objects}


def _put(hub: ModelHub, body: bytes, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        raise _Refused(400, "", "the bytes are not those of the checksum")
    hub.blobs[oid] = body
    return {}


def _commit(hub: ModelHub, body: bytes, name: str, branch: str) -> Any:
    repository, head = _repository(hub, name), _head(hub, name, branch)
    lines = [json.loads(line) for line in body.splitlines()]
    if lines[0]["value"].get("parentCommit") not in (None, head):
        raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(repository.trees[head])
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    commit = repository.commit(branch, files)
    return {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}", "hookOutput": ""}


def _resolve(hub: ModelHub, body: bytes, name: str, revision: str, path: str) -> Any:
    head = _head(hub, name, revision)
    files = hub.repositories[name].trees[head]
    if path not in files:
        raise _Refused(404, "EntryNotFound", "Entry not found")
    return 200, {"ETag": f'"{blob_id(files[path])}"', "X-Repo-Commit": head, "Accept-Ranges": "bytes"}, files[path]


NAME = "([^/]+/[^/]+)"
ROUTES: dict[str, Callable[..., Any]] = {
    f"GET /api/models/{NAME}": _info,
    f"GET /api/models/{NAME}/revision/([^/]+)": _info,
    f"GET /api/models/{NAME}/tree/([^/]+)": _tree,
    "POST /api/repos/create": _create,
    f"POST /api/models/{NAME}/branch/([^/]+)": _branch,
    "POST /api/validate-yaml": lambda hub, body: {"errors": [], "warnings": []},
    f"POST /api/models/{NAME}/preupload/([^/]+)": _preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _batch,
    "PUT /blob/([0-9a-f]+)": _put,
    f"POST /api/models/{NAME}/commit/([^/]+)": _commit,
    f"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": _resolve,
}
