"""A folder of vectors on disk: how numbers are stored, how a shard comes to be there whole, how both are read again. No torch.

    pictures.jsonl               of a folder of pictures: their paths, in the order of the rows
    plan.json                    what is being made: model, input, layout; a folder holds one plan
    part-00000.safetensors       "embeddings", the rows of the items 0 to shard_items - 1 (part-00000.npy with storage "numpy")
    part-00000.ids.jsonl         their ids, one JSON value a line
    part-00000.json              which rows, sha256 and bytes of its files, the items left out and why; written last: the shard is done
    skipped.jsonl                all items left out: row, id, reason
    manifest.json                the plan, the counts, and sha256 and bytes of every file; written last of all

Precisions, by the tensors of a shard (numpy: a file for each, part-00000.factor.npy for the factor):

    float32   (N, D) float32
    float16   (N, D) float16; an error of at most 2^-12 for each number of a unit row
    int8      (N, D) int8, and "factor" (N,) float32: number = code x factor of its row, with an error of at most factor / 2 <= 1/254
    binary    (N, ceil(D / 8)) uint8, eight signs a byte, the first in the highest bit, 1 for above zero: number = +-1 / sqrt(D), so that
              the product of two rows is 1 - 2 x Hamming distance / D

Shape letters: N rows, D numbers of a row.
"""

from __future__ import annotations

import io as memory
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from vlm2vec import io
from vlm2vec.errors import EnvError, InputError, ManifestError
from vlm2vec.log import get_logger
from vlm2vec.quantize import quantize, truncate

FORMAT = 1
KIND = "vlm2vec vectors"
PLAN, LISTING, SKIPPED = "plan.json", "pictures.jsonl", "skipped.jsonl"
PRECISIONS = ("float32", "float16", "int8", "binary")
STORAGES = ("safetensors", "numpy")
logger = get_logger(__name__)


# -- numbers -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How rows of `dims` numbers are stored. Raises InputError for a precision or a storage that does not exist."""

    dims: int
    precision: str = "float32"
    storage: str = "safetensors"

    def __post_init__(self) -> None:
        for value, known in ((self.precision, PRECISIONS), (self.storage, STORAGES)):
            if value not in known:
                raise InputError(f"unknown way of storing vectors {value!r}; there are {', '.join(known)}")

    @property
    def tensors(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of one row in each tensor."""
        width = -(-self.dims // 8) if self.precision == "binary" else self.dims
        dtype = np.dtype("uint8" if self.precision == "binary" else self.precision)
        return {"embeddings": (dtype, (width,))} | ({"factor": (np.dtype("float32"), ())} if self.precision == "int8" else {})

    @property
    def row_bytes(self) -> int:
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.tensors.values())

    def pack(self, rows_ND: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The tensors of unit rows (N, D or more): cut to `dims` at unit length, in the precision. Raises what `quantize.truncate` does."""
        short_ND = truncate(rows_ND, self.dims)
        if self.precision == "int8":
            codes = quantize(short_ND, precision="int8")
            return {"embeddings": codes.code_ND, "factor": codes.factor_N.astype(np.float32)}
        if self.precision == "binary":
            return {"embeddings": np.packbits(short_ND > 0, axis=1)}
        return {"embeddings": np.ascontiguousarray(short_ND, dtype=self.precision)}

    def unpack(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Rows (N, D) of float32 from their tensors."""
        codes = tensors["embeddings"]
        if self.precision == "binary":
            signs_ND = np.unpackbits(codes, axis=-1, count=self.dims).astype(np.float32) * 2 - 1
            return signs_ND * np.float32(self.dims**-0.5)
        if self.precision == "int8":
            return codes.astype(np.float32) * tensors["factor"][..., None]
        return np.asarray(codes, dtype=np.float32)

    def files(self, name: str) -> dict[str, str]:
        """The file that holds each tensor of a shard."""
        if self.storage == "safetensors":
            return dict.fromkeys(self.tensors, f"{name}.safetensors")
        return {tensor: f"{name}.npy" if tensor == "embeddings" else f"{name}.{tensor}.npy" for tensor in self.tensors}

    def encode(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
        """The contents of a shard's files, the one with the embeddings last."""
        if self.storage == "safetensors":
            return {f"{name}.safetensors": save(dict(tensors))}
        return {file: _npy(tensors[tensor]) for tensor, file in reversed(self.files(name).items())}

    def open(self, folder: Path, name: str, rows: int) -> dict[str, NDArray[Any]]:
        """The tensors of a shard of `rows` rows, mapped into memory. Raises ManifestError for a file that is not what was written."""
        opened: dict[str, NDArray[Any]] = {}
        for tensor, file in self.files(name).items():
            dtype, shape = self.tensors[tensor]
            try:
                offset = _safetensors_offset(folder / file, tensor) if self.storage == "safetensors" else _npy_offset(folder / file)
                opened[tensor] = np.memmap(folder / file, dtype, "r", offset, (rows, *shape))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise _damaged(folder / file, error) from None
        return opened


def _npy(array: NDArray[Any]) -> bytes:
    buffer = memory.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _npy_offset(file: Path) -> int:
    """Where the numbers begin."""
    with file.open("rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return stream.tell()


def _safetensors_offset(file: Path, tensor: str) -> int:
    """Where the numbers of a tensor begin: behind eight bytes with the length of the JSON header, the header, and what lies before it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, 1 << 20)))
    return 8 + length + int(header[tensor]["data_offsets"][0])


def _damaged(file: Path, error: Exception) -> ManifestError:
    return ManifestError(f"{file} is missing or damaged ({error}); run the command that made it again")


# -- writing -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """The rows [first, first + items) of the input."""

    name: str
    first: int
    items: int


def shards_of(items: int, size: int) -> list[Shard]:
    """All items in shards of `size`: a function of the input alone, so that any number of processes makes the same ones."""
    return [Shard(f"part-{first // size:05d}", first, min(size, items - first)) for first in range(0, items, size)]


class VectorFolder:
    """A folder that is being filled after a plan; several processes fill shards of their own."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder, self.plan = folder, plan
        self.layout = Layout(plan["dims"], plan["precision"], plan["storage"])
        self.digest = io.digest(plan)

    def begin(self) -> None:
        """Write the plan, or find it there. Raises InputError where the folder holds something else or a plan that differs."""
        file = self.folder / PLAN
        if not file.exists():
            others = [path.name for path in self.folder.glob("*") if not path.name.startswith(".") and path.name != LISTING]
            if others:
                raise InputError(f"{self.folder} holds {min(others)} but no {PLAN}, so it is not ours to fill: choose another folder")
            io.write_json(file, self.plan)
        elif changed := list(_differences(io.read_json(file), self.plan)):
            raise InputError(f"{self.folder} was begun with another {'; '.join(changed)}; give the same again, or choose another folder")

    def finished(self, shard: Shard) -> bool:
        """Whether the shard is there and undamaged; a damaged one is named in a warning."""
        try:
            self.receipt(shard)
        except ManifestError as error:
            logger.warning("%s; its items are encoded again", error)
            return False
        except FileNotFoundError:
            return False
        return True

    def receipt(self, shard: Shard, check: bool = True) -> dict[str, Any]:
        """What was noted when the shard was done; `check` holds its files against their sha256. ManifestError for a damaged shard."""
        file = self.folder / f"{shard.name}.json"
        if not file.exists():
            raise FileNotFoundError(file)
        try:
            found = io.read_json(file)
            intact = isinstance(found, dict) and found.pop("digest") == io.digest(found)
        except (InputError, KeyError) as error:
            raise ManifestError(f"{file} is damaged ({error})") from None
        if not intact or found["plan"] != self.digest:
            raise ManifestError(f"{file} is damaged or of another plan")
        for name, expected in found["files"].items() if check else ():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != expected["bytes"] or io.sha256_file(path) != expected["sha256"]:
                raise ManifestError(f"{path} is missing or differs from its sha256")
        return found

    def put(self, shard: Shard, ids: Sequence[str | int], rows_ND: NDArray[np.float32], skipped: Sequence[dict[str, Any]]) -> None:
        """Publish a shard: ids, rows, then its receipt. Raises EnvError when the disk refuses, and what `Layout.pack` does."""
        contents = {f"{shard.name}.ids.jsonl": "".join(json.dumps(each) + "\n" for each in ids).encode("ascii")}
        contents |= self.layout.encode(shard.name, self.layout.pack(rows_ND))
        files = {name: {"sha256": io.sha256_bytes(data), "bytes": len(data)} for name, data in contents.items()}
        for name, data in contents.items():
            io.write_atomic(self.folder / name, data)
        receipt = {"format": FORMAT, "plan": self.digest, **asdict(shard), "rows": len(ids), "files": files, "skipped": list(skipped)}
        io.write_json(self.folder / f"{shard.name}.json", {**receipt, "digest": io.digest(receipt)})

    def finish(self, shards: Sequence[Shard], **told: Any) -> dict[str, Any]:
        """Write the list of items left out and the manifest; returns the manifest. Raises EnvError where a shard is not there."""
        files: dict[str, Any] = {}
        parts, skipped = [], []
        for shard in shards:
            try:
                receipt = self.receipt(shard, check=False)
            except (FileNotFoundError, ManifestError) as error:
                raise EnvError(f"{self.folder}: {shard.name} vanished ({error}); do all processes see the same folder?") from None
            files |= receipt["files"]
            parts.append({"name": shard.name, "first": shard.first, "rows": receipt["rows"]})
            skipped += receipt["skipped"]
        io.rewrite_jsonl(self.folder / SKIPPED, skipped)
        data = (self.folder / SKIPPED).read_bytes()
        files[SKIPPED] = {"sha256": io.sha256_bytes(data), "bytes": len(data)}
        counts = {"rows": sum(part["rows"] for part in parts), "skipped": len(skipped)}
        manifest = {**self.plan, **told, **counts, "shards": parts, "files": files}
        io.write_json(self.folder / io.MANIFEST, manifest)
        return manifest


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The fields that differ, as "dims: 256 there, 128 here"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".strip("."))
    elif old != new:
        yield f"{key}: {json.dumps(old)[:60]} there, {json.dumps(new)[:60]} here"


# -- reading -----------------------------------------------------------------------------------------------------------------------------


class Vectors:
    """The rows of a folder as float32, read from disk as they are asked for: `rows[7]`, `rows[a:b]`, `rows[[3, 1]]`, `np.asarray(rows)`."""

    def __init__(self, folder: Path, layout: Layout, parts: Sequence[tuple[str, int]]) -> None:
        self.folder, self.layout, self.parts = folder, layout, list(parts)
        self.ends = np.cumsum([0] + [rows for _, rows in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.layout.dims

    @property
    def dtype(self) -> np.dtype[np.float32]:
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        return 2

    def __getitem__(self, rows: int | slice | Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Row (D,) or rows (n, D). Raises IndexError beyond the end and ManifestError for a damaged shard."""
        if isinstance(rows, int | np.integer):
            return self[[int(rows)]][0]
        if isinstance(rows, slice):
            return self._gather(np.arange(*rows.indices(len(self))))
        index_n = np.asarray(rows)
        index_n = np.flatnonzero(index_n) if index_n.dtype == bool else index_n.astype(np.int64)
        if len(index_n) and not (-len(self) <= index_n.min() and index_n.max() < len(self)):
            raise IndexError(f"row {int(index_n.max())} or {int(index_n.min())} of {len(self)}")
        return self._gather(index_n % max(len(self), 1))

    def _gather(self, index_n: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.empty((len(index_n), self.layout.dims), dtype=np.float32)
        shard_n = np.searchsorted(self.ends, index_n, side="right") - 1
        for shard in np.unique(shard_n):
            here_n = shard_n == shard
            name, rows = self.parts[shard]
            inside = index_n[here_n] - self.ends[shard]
            found[here_n] = self.layout.unpack({key: codes[inside] for key, codes in self.layout.open(self.folder, name, rows).items()})
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)


def read_vectors(folder: str | Path, verify: bool = False) -> tuple[list[str | int], Vectors]:
    """The ids and the rows of a finished folder, in the order of the input; row i belongs to id i.

    Ids are held in memory, rows read as they are asked for; `np.asarray(rows)` is all of them. `verify` holds every file against its
    sha256. Raises InputError where there is no finished folder, ManifestError for a damaged one.
    """
    manifest = _manifest(Path(folder), verify)
    rows = _rows(Path(folder), manifest, manifest["shards"])
    return [each for part in manifest["shards"] for each in _ids(Path(folder), part)], rows


def iterate_vectors(folder: str | Path, verify: bool = False) -> Iterator[tuple[list[str | int], NDArray[np.float32]]]:
    """Ids and rows (n, D) float32 of one shard after the other, which is what is held in memory; errors as for `read_vectors`."""
    manifest = _manifest(Path(folder), verify)
    for part in manifest["shards"]:
        yield _ids(Path(folder), part), _rows(Path(folder), manifest, [part])[:]


def _manifest(folder: Path, verify: bool) -> dict[str, Any]:
    if not (folder / io.MANIFEST).is_file():
        begun = (folder / PLAN).is_file()
        raise InputError(f"{folder} is not finished: run the same command again" if begun else f"{folder} holds no vectors of ours")
    manifest = io.read_json(folder / io.MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(f"{folder / io.MANIFEST} is not the manifest of vectors")
    if manifest["format"] != FORMAT:
        raise InputError(f"{folder}: written in format {manifest['format']}; this version reads format {FORMAT}, upgrade vlm2vec")
    if verify:
        io.verify_manifest(folder)
    return manifest


def _rows(folder: Path, manifest: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> Vectors:
    layout = Layout(manifest["dims"], manifest["precision"], manifest["storage"])
    return Vectors(folder, layout, [(part["name"], part["rows"]) for part in parts])


def _ids(folder: Path, part: Mapping[str, Any]) -> list[str | int]:
    file = folder / f"{part['name']}.ids.jsonl"
    try:
        found = list(map(json.loads, file.read_text("ascii").splitlines()))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from None
    if len(found) != part["rows"]:
        raise ManifestError(f"{file} has {len(found)} ids for {part['rows']} rows; run the command that made it again")
    return found
