"""Weight files as bytes: is every safetensors file whole, do its tensors fit, and the one place that reads a published PyTorch file.

A Git-LFS pointer, an HTML error page or a truncated download is named before anything is loaded, from file sizes and headers alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch._weights_only_unpickler import UnpicklingError  # what torch's restricted reader raises

from vlm2vec.errors import ModelError
from vlm2vec.io import read_json, sha256_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
LFS_POINTER = b"version https://git-lfs"
STRANGE = "the file was made for another model or its keys were renamed"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors and as torch names them
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
UNREADABLE = (UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)


def check_weights(folder: Path) -> None:
    """Raise ModelError unless `folder` holds one whole model in safetensors: a single file, or an index and all its shards."""
    if (folder / INDEX).is_file():
        check_text(folder / INDEX)
        shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / INDEX}: lists {shard}, which is missing (of {len(shards)} shards); download the model again")
            check_safetensors(folder / shard)
    elif (folder / WEIGHTS).is_file():
        check_safetensors(folder / WEIGHTS)
    else:
        raise ModelError(f"{folder}: no {WEIGHTS}{_pickles(folder)}")


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in the safetensors of `folder`, which `check_weights` has passed."""
    if (folder / INDEX).is_file():
        return set(read_json(folder / INDEX)["weight_map"])
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return set(file.keys())


def stored_dtype(folder: Path) -> str:
    """The number format, as torch names it, that most tensors in the safetensors of `folder` have."""
    check_weights(folder)
    files = set(read_json(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else {WEIGHTS}
    formats: Counter[str] = Counter()
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            formats.update(file.get_slice(tensor).get_dtype() for tensor in set(file.keys()))
    return next((DTYPES[kind] for kind, _ in formats.most_common() if kind in DTYPES), "float32")


def check_safetensors(file: Path) -> None:
    """Raise ModelError unless `file` is a safetensors file of exactly the length that its header announces."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        _check_not_text(file, start, size)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > HEADER_LIMIT:
            raise ModelError(f"{file}: not a safetensors file ({size} bytes)")
        stream.seek(8)
        header = stream.read(length)
    try:
        tensors = json.loads(header)
        expected = 8 + length + max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ModelError(f"{file}: the safetensors header is damaged or cut off ({size} bytes); download it again") from None
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise ModelError(f"{file}: {fault}: {size} bytes, its header says {expected}; download it again")


def check_text(file: Path) -> None:
    """Raise ModelError if a JSON or text file of a checkpoint is a Git-LFS pointer or an HTML page."""
    with file.open("rb") as stream:
        _check_not_text(file, stream.read(64), file.stat().st_size)


def _check_not_text(file: Path, start: bytes, size: int) -> None:
    if start.startswith(LFS_POINTER):
        raise ModelError(f"{file}: file is a Git-LFS pointer ({size} bytes); run `git lfs pull` or download the file itself")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ModelError(f"{file}: file is an HTML page ({size} bytes), probably an error page; download it again")


def _pickles(folder: Path) -> str:
    found = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not found:
        return "; the folder holds no weights"
    return f", only {found[0]}: pickle weights are refused because loading one can run code; convert it to safetensors"


def check_sha256(file: Path, sha256: str) -> None:
    """Raise ModelError unless the bytes of a published file are the ones we know."""
    found = sha256_file(file)
    if found != sha256:
        raise ModelError(f"{file}: sha256 is {found}, expected {sha256}; install the pinned version of its package again")


def read_published_weights(file: Path, sha256: str = "") -> dict[str, Tensor]:
    """Tensors of a published PyTorch file, read without unpickling objects; its bytes are checked first where `sha256` is known.

    Raises ModelError if it holds anything but tensors by name; no code in it is run.
    """
    if sha256:
        check_sha256(file, sha256)
    check_text(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:  # torch's own message recommends to switch its protection off, so it is not repeated
        raise ModelError(f"{file}: damaged, or holds more than tensors ({type(error).__name__}); nothing in it was run") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise ModelError(f"{file}: holds more than tensors by name, so these are no published weights")
    return tensors


def read_adapter(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file with an adapter's tensors, and the tensors as it calls them; safetensors wins over a PyTorch file beside it.

    Raises ModelError if there is neither, or if the file is damaged.
    """
    file, pickled = directory / ADAPTER_WEIGHTS, directory / ADAPTER_PICKLE
    if not file.is_file() and pickled.is_file():
        return pickled, read_published_weights(pickled)
    if not file.is_file():
        raise ModelError(f"{file}: not found, and no {ADAPTER_PICKLE} either; copy or train the adapter again")
    return file, read_safetensors(file)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises ModelError if it is missing, damaged or something else."""
    if not file.is_file():
        raise ModelError(f"{file}: not found; copy it again")
    check_safetensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file}: not a readable safetensors file ({error}); copy it again") from error


def misfit(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], called: Mapping[str, str] | None = None, exact: bool = False
) -> str:
    """What keeps `found` from taking the place of `expected`, "" if nothing does.

    It needs the same names and shapes, in finite floating-point numbers; with `exact` also the same number formats. No number of `expected`
    is looked at: it may lie on the device "meta". `called` gives the names of found tensors as their file has them, where they differ.
    """
    for name in sorted(expected.keys() - found.keys()):
        return f"tensor {name} is missing; {STRANGE}"
    for name, tensor in sorted(found.items()):
        if problem := _misfit(expected.get(name), tensor, exact):
            return f"tensor {(called or {}).get(name, name)} {problem}"
    return ""


def _misfit(expected: Tensor | None, found: Tensor, exact: bool) -> str:
    if expected is None:
        return f"is unexpected; {STRANGE}"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, the model needs {tuple(expected.shape)}"
    if not found.is_floating_point() or (exact and found.dtype != expected.dtype):
        return f"holds {_format(found)}, not {_format(expected) if exact else 'floating-point numbers'}"
    bad = int((~torch.isfinite(found.float())).sum())  # as float32, in which 8-bit numbers can be asked and large float64 ones overflow
    return f"holds {bad} non-finite values; the file is damaged or the training diverged" if bad else ""


def _format(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
