"""Weights that others published as PyTorch files: only tensors come out, and nothing in them is run."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm2vec.backbones.weights import misfit, read_adapter, read_published_weights, read_safetensors
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"a": None}, "tensor a is missing; the file was made for another model or its keys were renamed"),
        ({"c": torch.zeros(1)}, "tensor c is unexpected; the file was made for another model or its keys were renamed"),
        ({"a": torch.zeros(3, 2)}, "tensor a has shape (3, 2), the model needs (2, 3)"),
        ({"a": torch.zeros(2, 3, dtype=torch.int8)}, "tensor a holds int8, not {}"),
        ({"a": torch.full((2, 3), float("nan"))}, "tensor a holds 6 non-finite values; the file is damaged or the training diverged"),
    ],
)
def test_what_keeps_tensors_from_their_place_is_named(change: dict[str, torch.Tensor | None], words: str) -> None:
    expected = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}
    found = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    assert misfit(expected, found) == words.format("floating-point numbers")
    assert misfit(expected, found, exact=True) == words.format("float32")


@pytest.mark.parametrize(
    ("dtype", "value", "fits"), [("float64", 1e300, False), ("float8_e4m3fn", float("nan"), False), ("bfloat16", 2.0, True)]
)
def test_another_number_format_fits_if_float32_holds_its_numbers(dtype: str, value: float, fits: bool) -> None:
    expected, found = {"a": torch.zeros(3)}, {"a": torch.full((3,), value, dtype=torch.float64).to(getattr(torch, dtype))}
    assert misfit(expected, found).startswith("tensor a holds 3 non-finite values") != fits
    assert misfit(expected, found, exact=True) == f"tensor a holds {dtype}, not float32"


def test_what_is_called_otherwise_in_its_file_is_named_so() -> None:
    assert misfit({"a": torch.zeros(1)}, {"a": torch.zeros(2)}, {"a": "old.a"}).startswith("tensor old.a has shape")


def test_a_safetensors_file_is_read_or_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match=r"x.safetensors: not found"):
        read_safetensors(file)
    save_file(TENSORS, file)
    assert read_safetensors(file).keys() == TENSORS.keys()
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"F37"'))
    with pytest.raises(ModelError, match=r"x.safetensors: not a readable safetensors file"):
        read_safetensors(file)
