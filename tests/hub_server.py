"""A small Hub on loopback: dataset repositories at commits, file lists, files with ranges, a CDN behind redirects, failures on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".parquet", ".zip", ".tar.gz")


@dataclass
class Failure:
    """What happens to requests whose path matches, `times` times: a status, or a connection that ends after `after` bytes of the body."""

    pattern: str
    status: int = 0
    times: int = 1
    after: int = -1
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it."""

    host: str
    path: str
    range: str
    authorization: str


class Hub:
    """`with Hub(...) as hub:` serves until the block ends. `publish` makes a commit and moves main to it; `asked` lists all requests."""

    def __init__(self, ranges: bool = True, cdn: bool = False) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, str] = {}
        self.failures: list[Failure] = []
        self.instead: dict[str, bytes] = {}  # path -> bytes delivered in its place
        self.gated: dict[str, str] = {}  # repository -> the token that may read it
        self.ranges, self.asked, self.lock = ranges, list[Asked](), threading.Lock()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, host)) for host in (("hub", "cdn") if cdn else ("hub",))]

    def __enter__(self) -> Hub:
        for server in self.servers:
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # clients of these tests are killed
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    def publish(self, repository: str, files: Mapping[str, bytes]) -> str:
        commit = hashlib.sha1(repr(sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())).encode()).hexdigest()
        self.repositories.setdefault(repository, {})[commit] = dict(files)
        self.heads[repository] = commit
        return commit

    def fetched(self) -> list[str]:
        """Paths of the requests for content, not for lists."""
        return [asked.path for asked in self.asked if "/api/" not in asked.path]


def _handler(hub: Hub, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes; the second would wait for a delayed answer to the first

        def log_message(self, format: str, *args: Any) -> None:
            """Silence."""

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                hub.asked.append(Asked(host, path, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
                failure = next((one for one in hub.failures if one.times > 0 and re.search(one.pattern, path)), None)
                if failure is not None:
                    failure.times -= 1
            if failure is not None and failure.status:
                self.send(failure.status, json.dumps({"error": failure.error}).encode(), {**failure.headers})
            else:
                self.route(path, -1 if failure is None else failure.after)

        def route(self, path: str, cut: int) -> None:
            listed = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
            content = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = listed or content
            repository = found[1] if found else ""
            if repository not in hub.repositories:
                return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            token = hub.gated.get(repository)
            if token and host == "hub" and self.headers.get("Authorization") != f"Bearer {token}":
                text = "Access to this dataset is restricted: you must be in the authorized list"
                return self.send(403, json.dumps({"error": text}).encode(), {"X-Error-Code": "GatedRepo", "X-Error-Message": text})
            revision = listed[3] if listed else content[2] if content else ""
            commit = hub.heads[repository] if revision == "main" else revision
            if commit not in hub.repositories[repository]:
                return self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            files = hub.repositories[repository][commit]
            if content:
                return self.content(repository, commit, content[3], files, cut)
            answer = {"id": repository, "sha": commit, "siblings": []} if listed and listed[2] == "revision" else _tree(files)
            return self.send(200, json.dumps(answer).encode())

        def content(self, repository: str, commit: str, path: str, files: Mapping[str, bytes], cut: int) -> None:
            if path not in files:
                return self.send(404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"})
            if host == "hub" and len(hub.servers) == 2 and path.endswith(LFS_SUFFIXES):
                place = f"http://127.0.0.1:{hub.servers[1].server_port}/datasets/{repository}/resolve/{commit}/{path}?signature=secret"
                return self.send(302, b"", {"Location": place})
            data = hub.instead.get(path, files[path])
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if start and hub.ranges:
                if int(start[1]) >= len(data):
                    return self.send(416, b"")
                headers = {"Content-Range": f"bytes {start[1]}-{len(data) - 1}/{len(data)}"}
                return self.send(206, data[int(start[1]) :], headers, cut)
            return self.send(200, data, {}, cut)

        def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int = -1) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if cut < 0 else body[:cut])
            self.close_connection = self.close_connection or cut >= 0

    return Handler


def _tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    folders = {path.rpartition("/")[0] for path in files if "/" in path}
    return [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)] + [
        _listed(path, data) for path, data in files.items()
    ]


def _listed(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob, "size": len(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
