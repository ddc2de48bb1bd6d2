"""Pairs with a picture that cannot be read: what is known of them, the file that lists them, and when they are too many."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm2vec import dist, io
from vlm2vec.errors import DataError
from vlm2vec.log import get_logger

FILE = "bad_samples.jsonl"
_KINDS = 12  # reasons listed in an error

_logger = get_logger(__name__)


@dataclass(frozen=True)
class BadPair:
    """A pair that cannot be read, why, and the pair that took its place; the ids are "source:row"."""

    id: str
    reason: str
    replaced_by: str


class BadPairs:
    """The bad pairs of a run, each once, in the order in which steps met them: `bad_samples.jsonl` in the run folder.

    As the log, the file of a run that was killed and resumed is that of an undisturbed one: what steps after `start` met is dropped.
    `allowed` pairs may be bad.
    """

    def __init__(self, run_dir: Path, allowed: int, start: int) -> None:
        self.file, self.allowed = run_dir / FILE, allowed
        rows = [row for row in io.read_jsonl(self.file) if row["step"] <= start] if self.file.exists() else []
        self.reasons: dict[str, str] = {row["id"]: row["reason"] for row in rows}
        dist.barrier()  # all have read before the main process writes
        if dist.is_main() and self.file.exists():
            io.rewrite_jsonl(self.file, rows)

    def add(self, step: int, pairs: Iterable[BadPair]) -> None:
        """Note what `step` met, on every rank the same. Raises DataError with a table of the reasons once there are too many."""
        for pair in pairs:
            if pair.id in self.reasons:
                continue
            self.reasons[pair.id] = pair.reason
            if dist.is_main():
                io.append_jsonl(self.file, {"step": step, **asdict(pair)})
            _logger.warning("%s; replaced by %s", pair.reason, pair.replaced_by)
            if len(self.reasons) > self.allowed:
                raise too_many(self.reasons.values(), f"step {step}: {len(self.reasons)} pairs, listed in {self.file},")


def too_many(reasons: Iterable[str], what: str) -> DataError:
    """The error that ends a run with more bad pairs than data.max_bad_fraction allows, with a table of the kinds of reasons."""
    kinds = Counter(_kind(reason) for reason in reasons)
    table = "\n".join(f"  {count:6,}  {kind}" for kind, count in kinds.most_common(_KINDS))
    return DataError(f"{what} have pictures that cannot be read, more than data.max_bad_fraction allows; repair the data:\n{table}")


def _kind(reason: str) -> str:
    """A reason without what differs from picture to picture: who it is about, numbers, its file."""
    about = reason.rpartition("': ")[2] if "': path leaves" not in reason else "path leaves root"
    return re.sub(r"\d[\d,.x]*", "N", re.sub(r": /.*", "", about))
