from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm2vec.data.images import load_image
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import ImageError, PathError
from vlm2vec.io import safe_join

HOSTILE = {
    "/etc/passwd": "absolute",
    "//etc/passwd": "absolute",
    "/": "absolute",
    "/dev/zero": "absolute",
    "/proc/self/environ": "absolute",
    "\\\\server\\share\\x.png": "absolute",
    "\\etc\\passwd": "absolute",
    "C:\\Windows\\win.ini": "absolute",
    "C:/Windows/win.ini": "absolute",
    "c:secret.png": "absolute",
    "..": "'..'",
    "../secret.png": "'..'",
    "../../secret.png": "'..'",
    "a/../../secret.png": "'..'",
    "a/../ok.png": "'..'",
    "./../secret.png": "'..'",
    "a/..": "'..'",
    "..\\secret.png": "'..'",
    "a\\..\\..\\secret.png": "'..'",
    "a/..\\../secret.png": "'..'",
    "../" * 200 + "etc/passwd": "'..'",
    "ok.png/../../secret.png": "'..'",
    "missing/../../secret.png": "'..'",
    "\0": "NUL",
    "ok.png\0.jpg": "NUL",
    "../secret.png\0ok.png": "NUL",
    "a" * 4097: "4097 characters",
    "a/" * 2500 + "x.png": "5005 characters",
    "b" * 300: "too long",
    "\ud800.png": "encoded",
    "": "folder",
    ".": "folder",
    "a": "folder",
    "a/": "folder",
    "pipe": "pipe",
    "socket": "socket",
    "device": "device",
    "link_to_secret.png": "symbolic link",
    "link_to_parent/secret.png": "symbolic link",
    "link_absolute": "symbolic link",
    "a/link_up/secret.png": "symbolic link",
    "loop": "symbolic links",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a picture, a secret beside it and everything that could lead to it or block a reader."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "ok.png").write_bytes(b"inside")
    (root / "a" / "deep.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link_to_secret.png").symlink_to("../secret.png")
    (root / "link_to_parent").symlink_to("..")
    (root / "link_absolute").symlink_to("/etc/passwd")
    (root / "a" / "link_up").symlink_to("../..")
    (root / "link_inside.png").symlink_to("a/deep.png")
    (root / "loop").symlink_to("loop")
    (root / "device").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe")
    here = os.getcwd()
    os.chdir(root)  # the path of a Unix socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    os.chdir(here)
    return root


@pytest.mark.parametrize(("relative", "reason"), HOSTILE.items(), ids=lambda value: repr(value[:30]))
def test_hostile_path_is_refused(root: Path, relative: str, reason: str) -> None:
    if relative == "device":  # a link to a device is refused as a link already, so look at the device from its own folder
        root, relative = Path("/dev"), "zero"
    with pytest.raises(PathError, match="path leaves root") as caught:
        safe_join(root, relative)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


def test_no_hostile_path_opens_anything_outside(root: Path, forked: Callable[..., int]) -> None:
    assert len(HOSTILE) >= 40

    def child() -> None:  # audit hooks cannot be removed, so this happens in a process of its own
        outside: list[str] = []

        def watch(event: str, arguments: tuple) -> None:
            if event == "open" and not str(arguments[0]).startswith(str(root)):
                outside.append(str(arguments[0]))

        sys.addaudithook(watch)
        refused = 0
        for relative in HOSTILE:
            try:
                load_image(ImageRef(safe_join(root, relative)))
            except ImageError:
                refused += 1
        assert (refused, outside) == (len(HOSTILE), [])

    assert forked(child) == 0


@pytest.mark.parametrize("relative", ["ok.png", "./ok.png", "a/deep.png", "a//deep.png", "link_inside.png", "missing.png", "..ok", "a/..."])
def test_path_below_the_root_is_joined(root: Path, relative: str) -> None:
    joined = safe_join(root, relative)
    assert joined == (root / relative).resolve()
    assert root.resolve() in joined.parents


def test_root_may_be_a_link_or_relative(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert safe_join(tmp_path / "alias", "ok.png") == root.resolve() / "ok.png"
    monkeypatch.chdir(tmp_path)
    assert safe_join(Path("root"), "ok.png") == root.resolve() / "ok.png"
    assert safe_join(Path("/"), "etc/hostname") == Path("/etc/hostname").resolve()


def test_sibling_with_the_same_prefix_is_outside(root: Path) -> None:
    evil = root.with_name("root-evil")
    evil.mkdir()
    (root / "prefix").symlink_to(evil)
    (evil / "x.png").write_bytes(b"")
    with pytest.raises(PathError, match="symbolic link"):
        safe_join(root, "prefix/x.png")
