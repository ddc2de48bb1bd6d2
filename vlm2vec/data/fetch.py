"""`vlm2vec data get`: a dataset from the Hub into the folder layout that recipes and suites expect, verified, and only what is missing.

Next to the data, `.fetch/state.json` says at which commit each repository stands, what it lists there, and which archives were unpacked.
With that record a complete folder is known to be complete without a network, and a killed run goes on where it stopped: half a file
waits under `.fetch/`, a half unpacked archive is unpacked again, a whole one is not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from vlm2vec import io
from vlm2vec.data import hub
from vlm2vec.data.archives import require_space, show_bytes, unpack
from vlm2vec.data.downloads import Download, Seen, load_sheet
from vlm2vec.data.hub import RemoteFile
from vlm2vec.data.ledger import FOLDER, Ledger
from vlm2vec.data.mmeb import CANDIDATES, EVAL_QUERY
from vlm2vec.data.readers import Column, read_rows
from vlm2vec.errors import DataError
from vlm2vec.log import get_logger, progress
from vlm2vec.strict_yaml import nearest

_logger = get_logger(__name__)


# -- what is to be done ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What was asked for: sets by folder name, out of `total`, and splits."""

    download: Download
    folder: Path
    sets: tuple[str, ...]
    total: int
    splits: tuple[str, ...]
    keep_archives: bool = False

    @property
    def every(self) -> bool:
        return len(self.sets) == self.total

    @property
    def selection(self) -> tuple[str, ...] | None:
        """The sets whose pictures are picked from a common archive; None when everything in an archive is taken."""
        return None if self.every or self.download.pictures.per_set else self.sets

    def target(self, rows: RemoteFile) -> Path:
        return self.folder / self.download.rows.into / rows.path


@dataclass(frozen=True)
class Plan:
    """What is there and what is missing. Sizes in bytes; `pictures` estimates what the missing archives unpack to, `needed` the room that
    fetching takes at its height."""

    request: Request
    commits: dict[str, str]
    rows: tuple[RemoteFile, ...]
    archives: tuple[RemoteFile, ...]
    missing_rows: tuple[RemoteFile, ...]
    missing_archives: tuple[RemoteFile, ...]
    begun: int
    pictures: int
    needed: int

    @property
    def complete(self) -> bool:
        return not self.missing_rows and not self.missing_archives

    def text(self) -> str:
        """The plan for people."""
        rows, archives = _bytes(self.missing_rows), _bytes(self.missing_archives)
        lines = [f"{self.request.download.name} into {self.request.folder}"]
        lines += [f"  from      {repository} at {commit}" for repository, commit in self.commits.items()]
        lines += [f"  sets      {len(self.request.sets)}, splits: {', '.join(self.request.splits)}"]
        lines += [f"  rows      {len(self.rows)} files, {len(self.missing_rows)} missing: {show_bytes(rows)}"]
        lines += [f"  archives  {len(self.archives)}, {len(self.missing_archives)} missing: {show_bytes(archives)}"]
        if self.begun:
            lines += [f"  begun     {show_bytes(self.begun)} of these are here already"]
        if not self.complete:
            lines += [f"  room      {show_bytes(self.needed)} at its height, the pictures about {show_bytes(self.pictures)} of them"]
        return "\n".join(lines)


def request_for(
    name: str,
    to: Path | str | None = None,
    subsets: Sequence[str] = (),
    split: str | None = None,
    keep_archives: bool = False,
) -> Request:
    """What `vlm2vec data get` was asked for. Raises DataError for a name, a set or a split that there is not."""
    download = load_sheet().find(name)
    splits = download.rows.splits
    if split not in (None, "all", *splits):
        raise DataError(f"{name} has no split {split!r}; there are: {', '.join(splits)} and all")
    known = download.sets()
    for subset in subsets:
        if subset not in known:
            near = nearest(subset, known)
            hint = f"did you mean {near}?" if near else f"there are: {', '.join(known)}"
            raise DataError(f"{name} has no set {subset!r}; {hint}")
    sets = tuple(path for set_name, path in known.items() if not subsets or set_name in subsets)
    chosen = splits if split == "all" else (split or splits[0],)
    return Request(download, Path(to or download.to), sets, len(known), chosen, keep_archives)


def make_plan(request: Request, ledger: Ledger) -> Plan:
    """Compare what was asked for with what is there. Raises DataError when a repository lacks a set, a split or an archive."""
    download = request.download
    rows = tuple(_rows(request, ledger.files(download.rows.repository)))
    archives = tuple(_archives(request, ledger.files(download.pictures.repository)))
    missing_rows = tuple(file for file in rows if not hub.matches(request.target(file), file))
    missing_archives = tuple(file for file in archives if not ledger.holds(file, request.folder, request.selection))
    begun = sum(_begun(file, request.folder) for file in (*missing_rows, *missing_archives))
    share = 1.0 if request.selection is None else len(request.sets) / request.total
    unpacked = [int(file.bytes * download.pictures.unpacked * share) for file in missing_archives]
    needed = max(0, _height(_bytes(missing_rows), missing_archives, unpacked, request.keep_archives) - begun)
    used = dict.fromkeys((download.rows.repository, download.pictures.repository))
    commits = {repository: ledger.sources[repository]["commit"] for repository in used}
    return Plan(request, commits, rows, archives, missing_rows, missing_archives, begun, sum(unpacked), needed)


def _begun(file: RemoteFile, folder: Path) -> int:
    """Bytes of a missing file that have been fetched already, or put there by hand."""
    places = (hub.partial_path(file, folder / FOLDER), _archive_path(file, folder / FOLDER), folder / file.path)
    return min(file.bytes, sum(path.stat().st_size for path in places if path.is_file()))


def _bytes(files: Sequence[RemoteFile]) -> int:
    return sum(file.bytes for file in files)


def _height(held: int, archives: Sequence[RemoteFile], unpacked: Sequence[int], keep: bool) -> int:
    """The most bytes that lie on the disk at once: archives come one after the other and go once they are unpacked, unless kept."""
    height = held
    for archive, pictures in zip(archives, unpacked, strict=True):
        height = max(height, held + archive.bytes + pictures)
        held += pictures + (archive.bytes if keep else 0)
    return height


def _rows(request: Request, files: Sequence[RemoteFile]) -> Iterator[RemoteFile]:
    spec = request.download.rows
    for name in request.sets:
        for split in request.splits:
            found = [file for file in files if fnmatchcase(file.path, spec.files.format(set=name, split=split))]
            if not found:
                there = sorted(file.path for file in files if file.path.startswith(f"{name}/"))
                raise DataError(
                    f"{spec.repository}@{files[0].commit if files else '?'}: no rows of {name}, split {split!r} "
                    f"({spec.files.format(set=name, split=split)}); it holds {', '.join(there) or 'nothing for it'}"
                )
            yield from sorted(found, key=lambda file: file.path)


def _archives(request: Request, files: Sequence[RemoteFile]) -> Iterator[RemoteFile]:
    spec = request.download.pictures
    by_path = {file.path: file for file in files}
    for path in dict.fromkeys(spec.file.format(set=name) for name in request.sets):
        if path not in by_path:
            near = ", ".join(sorted(name for name in by_path if not name.endswith(".parquet"))) or "no archive"
            raise DataError(f"{spec.repository}: no {path} at this revision; it holds {near}")
        yield by_path[path]


# -- doing it ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """What a run did, and what lies where now."""

    plan: Plan
    ledger: Ledger

    def text(self) -> str:
        """The summary for people, with the next commands."""
        request, download = self.plan.request, self.plan.request.download
        records = [self.ledger.archive(file) for file in self.plan.archives]
        done = [len(self.plan.missing_rows), len(self.plan.missing_archives)]
        rows = Path(request.folder, download.rows.into, download.rows.files.format(set="<SET>", split=request.splits[0]))
        pictures = sum(sum(record["folders"].values()) for record in records)
        lines = [f"{download.name} is complete in {request.folder}"]
        lines += [f"  rows      {len(request.sets)} sets, {len(self.plan.rows)} files, {show_bytes(_bytes(self.plan.rows))}: {rows}"]
        lines += [f"  pictures  {pictures:,} files: {request.folder / download.pictures.into}"]
        lines += [f"  from      {repository} at {commit}" for repository, commit in self.plan.commits.items()]
        lines += [f"  this run  fetched {done[0]} files of rows and {done[1]} archives" if any(done) else "  this run  nothing was missing"]
        lines += [f"next: vlm2vec data check {request.folder}" + ("" if request.every else f" --subset {' '.join(request.sets)}")]
        return "\n".join([*lines, f"      {download.next}"] if download.next else lines)


def fetch(request: Request, revision: str | None = None) -> Fetched:
    """Fetch what is missing and return what lies where.

    `revision` None means the commit on record, or else main. Raises DataError for what the Hub does not have or give, EnvError when disk or
    network fail, RunLockedError when another process fetches into the same folder. Running it again goes on.
    """
    with io.run_lock(request.folder / FOLDER):
        ledger = _located(request, revision)
        ledger.save()
        plan = make_plan(request, ledger)
        _tidy(plan, ledger)
        if plan.complete:
            return Fetched(plan, ledger)
        _logger.info("%s", plan.text())
        _warn_of_changes(plan)
        hint = "choose another folder with --to, or fewer sets with --subset"
        free = require_space(request.folder, plan.needed, f"fetching {request.download.name}", hint)
        _logger.info("room: %s needed, %s free", show_bytes(plan.needed), show_bytes(free))
        _fetch_rows(plan)
        for archive in plan.missing_archives:
            _fetch_pictures(archive, request, ledger)
        return Fetched(plan, ledger)


def preview(request: Request, revision: str | None = None) -> Plan:
    """What `fetch` would do; writes nothing."""
    return make_plan(request, _located(request, revision))


def _located(request: Request, revision: str | None) -> Ledger:
    """The ledger with both repositories listed. A revision belongs to the repository of the rows."""
    ledger = Ledger.load(request.folder)
    rows, pictures = request.download.rows.repository, request.download.pictures.repository
    ledger.locate(rows, revision)
    if pictures != rows:
        ledger.locate(pictures, None)
    return ledger


def _warn_of_changes(plan: Plan) -> None:
    seen: dict[tuple[str, str], Seen] = {(entry.repository, entry.file): entry for entry in load_sheet().seen}
    for file in plan.missing_archives:
        known = seen.get((file.repository, file.path))
        if known and known.sha256 and file.checksum != f"sha256:{known.sha256}":
            was = f"{known.gigabytes:g} GB, sha256 {known.sha256[:12]}"
            _logger.warning("%s has changed since its layout was looked at (then %s, now %s)", file, was, show_bytes(file.bytes))


def _fetch_rows(plan: Plan) -> None:
    with _bar(_bytes(plan.missing_rows), "rows") as bar:
        for file in plan.missing_rows:
            hub.fetch_file(file, plan.request.target(file), plan.request.folder / FOLDER, bar)


def _bar(total: int, desc: str) -> Any:
    bar = progress(total, desc, "B")
    bar.unit_scale = True
    return bar


def _fetch_pictures(archive: RemoteFile, request: Request, ledger: Ledger) -> None:
    """Fetch one archive, unless it lies in the folder by hand, unpack it, and let it go unless it is to be kept."""
    spec, work = request.download.pictures, request.folder / FOLDER
    wanted = None if request.selection is None else _named_pictures(request, ledger)
    by_hand, fetched = request.folder / archive.path, _archive_path(archive, work)
    source = by_hand if hub.matches(by_hand, archive) else fetched
    if not source.exists():
        with _bar(archive.bytes, archive.path) as bar:
            hub.fetch_file(archive, fetched, work, bar)
    with _bar(archive.bytes, f"unpacking {archive.path}") as bar:
        made = unpack(source, request.folder / spec.into, work / "unpacking", spec.strip, wanted, progress=bar)
    for note in (*made.notes, *_shortfall(archive, made.files, wanted)):
        _logger.warning("%s: %s", archive.path, note)
    ledger.remember(archive, spec.into, request.selection, made)
    if source == fetched:
        _let_go(fetched, by_hand if request.keep_archives else None)
    if wanted is not None and not request.keep_archives:
        _logger.info("%s holds the pictures of all sets: more sets later fetch it again, unless --keep-archives keeps it", archive.path)


def _tidy(plan: Plan, ledger: Ledger) -> None:
    """Let go of what earlier runs left: an archive that was unpacked just before a kill, parts of files that are no longer listed, and
    records half written."""
    request, work = plan.request, plan.request.folder / FOLDER
    for archive in (file for file in plan.archives if file not in plan.missing_archives):
        if _archive_path(archive, work).exists():
            _let_go(_archive_path(archive, work), request.folder / archive.path if request.keep_archives else None)
    listed = [file for repository in ledger.sources for file in ledger.files(repository)]
    known = {path for file in listed for path in (hub.partial_path(file, work), _archive_path(file, work))}
    for left in (*work.glob("*.part"), *work.glob("*.archive"), *work.glob(".*.tmp")):
        if left not in known:
            left.unlink()


def _archive_path(archive: RemoteFile, work: Path) -> Path:
    """Where a whole archive waits to be unpacked."""
    return work / f"{archive.checksum.replace(':', '-')}.archive"


def _shortfall(archive: RemoteFile, files: int, wanted: frozenset[str] | None) -> Iterator[str]:
    """What to say about pictures that rows name and the archive lacks. Raises DataError when it has none of them."""
    if not files and wanted != frozenset():
        asked = f" of the {len(wanted):,} that the rows name, e.g. {min(wanted)}" if wanted else ""
        raise DataError(f"{archive}: holds no picture{asked}; its layout is not the one that downloads.yaml gives")
    if wanted and files < len(wanted):
        yield f"{len(wanted) - files:,} of {len(wanted):,} pictures that the rows name are not in it"


def _let_go(archive: Path, keep: Path | None) -> None:
    if keep is None:
        archive.unlink()
        return
    keep.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(archive, keep)


def _named_pictures(request: Request, ledger: Ledger) -> frozenset[str]:
    """Paths of all pictures that rows of the chosen evaluation sets name, below the folder of the pictures."""
    columns = [Column(EVAL_QUERY[1]), Column(CANDIDATES[1], many=True)]
    names: set[str] = set()
    for file in _rows(request, ledger.files(request.download.rows.repository)):
        table = read_rows([request.target(file)], columns)
        for column in (table.column(0), pc.list_flatten(table.column(1))):
            names.update(path for path in pc.unique(column).to_pylist() if path)
    return frozenset(names)
