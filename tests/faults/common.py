"""What the trials share: a run of a second, forks of it that are killed or denied the disk, and what it must end with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.conftest import start
from tests.runs import LORA, final_bytes, start_run, tiny_recipe
from vlm2vec import checkpoint
from vlm2vec.config import Recipe
from vlm2vec.errors import Vlm2VecError
from vlm2vec.io import MANIFEST, sha256_file
from vlm2vec.trainer import LOG

STEPS, EVERY = 8, 2
FAULT = "VLM2VEC_FAULT"


def changed(recipe: Recipe, section: str, **keys: Any) -> Recipe:
    return replace(recipe, **{section: replace(getattr(recipe, section), **keys)})


def light_recipe(run_dir: Path, steps: int = STEPS, every: int = EVERY, keep: int = 2, lora: str = LORA, **data: Any) -> Recipe:
    """Seconds shorter than `tiny_recipe`: fewer pairs and chunks, but still several of them, with dropout; more saves."""
    recipe = tiny_recipe(run_dir, steps=steps, lora=lora)
    recipe = changed(recipe, "train", global_batch=8, chunk_tokens=320)
    return changed(changed(recipe, "checkpoint", every=every, keep=keep), "data", **data)


def forked_run(recipe: Recipe, prepare: Callable[[], object] = lambda: None) -> int:
    """Train in a forked child that exits as the command line would, saying why; gives its process id."""

    def child() -> None:
        torch.set_num_threads(1)
        prepare()
        leave_as_the_command_line(lambda: start_run(recipe))

    return start(child)


def leave_as_the_command_line(function: Callable[[], object]) -> None:
    """End this process with the exit code of what `function` raises."""
    try:
        function()
    except Vlm2VecError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(child: int, within: float = 120.0) -> int:
    """The exit code of a child, minus the signal that killed it; a child that does not end in `within` seconds fails the trial."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the process did not end in {within} seconds")


def logged(run_dir: Path) -> int:
    """Steps in the log."""
    log = run_dir / LOG
    return log.read_bytes().count(b"\n") if log.exists() else 0


def saving(run_dir: Path) -> bool:
    """Whether a save was cut: its folder stands beside the others."""
    return any(run_dir.glob(".step-*.staging-*"))


def whole_run(run_dir: Path, **options: Any) -> dict[str, bytes]:
    """What the undisturbed run ends with."""
    assert exit_code(forked_run(light_recipe(run_dir, **options))) == 0
    return final_bytes(run_dir)


def reseal(folder: Path) -> None:
    """Make the manifest fit the files as they are now, as somebody would who damages a checkpoint on purpose."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    table = {path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": table}))


# ---- saves, again and again, of the same state


class Saver:
    """A training run that was stopped inside a save: `attempt` makes that save in a fork of it, again and again, into copies of its folder.

    The save is caught where the loop calls `checkpoint.save`, so that nothing here depends on its other arguments.
    """

    def __init__(self, run_dir: Path, save: Callable[[Path], object]) -> None:
        self.run_dir, self._save = run_dir, save
        self.before = checkpoint.latest(run_dir)
        self.copies = 0

    def copy(self) -> Path:
        self.copies += 1
        copy = self.run_dir.with_name(f"{self.run_dir.name}-{self.copies}")
        shutil.copytree(self.run_dir, copy)
        return copy

    def attempt(self, run_dir: Path, fault: str = "", prepare: Callable[[], object] = lambda: None) -> int:
        """Save into `run_dir` in a child with a fault injected; its exit code. What it says goes to `said` beside the folder."""

        def child() -> None:
            sys.stderr = open(run_dir.with_suffix(".said"), "w", encoding="utf-8", buffering=1)  # noqa: SIM115
            os.environ[FAULT] = fault
            prepare()
            leave_as_the_command_line(lambda: (self._save(run_dir), checkpoint.prune(run_dir, 2)))

        return exit_code(start(child))

    def said(self, run_dir: Path) -> str:
        return run_dir.with_suffix(".said").read_text()


class _Done(BaseException):
    pass


def at_save(run_dir: Path, number: int, trials: Callable[[Saver], object]) -> None:
    """Train until save `number` (from 1) and call `trials` there; the run ends with them."""
    original, count = checkpoint.save, 0

    def caught(folder: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count < number:
            return original(folder, *arguments, **options)
        trials(Saver(folder, lambda copy: original(copy, *arguments, **options)))
        raise _Done

    checkpoint.save = caught
    try:
        with contextlib.suppress(_Done):
            start_run(light_recipe(run_dir, keep=9))
    finally:
        checkpoint.save = original
    assert count == number, "the run ended before that save"


def points(saver: Saver) -> list[str]:
    """The named points that one save passes, in order."""
    folder = saver.copy()
    record = folder.with_suffix(".points")

    def note() -> None:
        from vlm2vec.io import disk, files, folders

        def fault(point: str, name: str = "") -> None:
            with record.open("a") as file:
                file.write(f"{point} {name}\n")

        for module in (disk, files, folders):
            module.fault = fault
        checkpoint.io.fault = fault

    assert saver.attempt(folder, prepare=note) == 0
    return record.read_text().splitlines()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable of the environment for children started inside."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def killed_at_save(recipe: Recipe, number: int) -> None:
    """Run until a save, from 1, is over but for its last rename, and kill it there."""

    def prepare() -> None:
        original, count = checkpoint.save, 0

        def deadly(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.environ[FAULT] = "before-rename:8:kill"
            return original(*arguments, **options)

        checkpoint.save = deadly

    assert exit_code(forked_run(recipe, prepare)) == -signal.SIGKILL
