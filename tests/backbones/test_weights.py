"""Weights that others published as PyTorch files: only tensors come out, and nothing in them is run."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm2vec.backbones.weights import read_adapter, read_published_weights
from vlm2vec.errors import ModelError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_by_name_are_read(kind: type, zipped: bool, tmp_path: Path) -> None:
    torch.save(kind(TENSORS), tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    file, found = read_adapter(tmp_path)
    assert file.name == "adapter_model.bin" and found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_safetensors_wins_over_a_pytorch_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    file, found = read_adapter(tmp_path)
    assert file.name == "adapter_model.safetensors" and found.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds more than tensors by name"),
        ({"state": TENSORS}, "holds more than tensors by name"),
        ({"when": datetime.date(2024, 1, 1)}, "damaged, or holds more than tensors .UnpicklingError.; nothing in it was run"),
    ],
)
def test_what_is_not_tensors_by_name_is_refused(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.bin")
    with pytest.raises(ModelError, match=f"weights.bin: {words}"):
        read_published_weights(tmp_path / "weights.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "weights.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="nothing in it was run"):
        read_published_weights(tmp_path / "weights.bin")
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save(TENSORS, file)
    whole = file.read_bytes()
    pieces = [whole[:length] for length in (0, 1, 2, 40, len(whole) // 2, len(whole) - 20)]
    for content in (*pieces, b"\x80\x02}q", b"\x80\x02N.", b"not a file of tensors", b"\x00" * 100):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="weights.bin"):
            read_published_weights(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelError, match="weights.bin: file is a Git-LFS pointer"):
        read_published_weights(file)


def test_known_bytes_are_checked_first(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="weights.bin: sha256 is .*, expected 00"):
        read_published_weights(tmp_path / "weights.bin", "00")


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter_model.safetensors: not found, and no adapter_model.bin either"):
        read_adapter(tmp_path)
