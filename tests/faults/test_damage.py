"""Damaged and hostile checkpoints: every flipped bit is seen, nothing that does not fit is loaded, nothing that is loaded is executed."""

from __future__ import annotations

import io as memory
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.common import changed, light_recipe, reseal
from tests.runs import start_run
from vlm2vec import checkpoint
from vlm2vec.backbones.builtin import builtin_checkpoint
from vlm2vec.config import Recipe
from vlm2vec.encoder import Encoder
from vlm2vec.errors import CheckpointError, ModelError, Vlm2VecError
from vlm2vec.io import verify_manifest
from vlm2vec.trainer import RECIPE

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
HTML = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
Harm = Callable[[Path, Path], None]  # the folder, and a canary file that must never appear


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("made") / "run"
    start_run(light_recipe(run_dir, steps=4))
    return run_dir


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    return newest


# ---- accidents


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.faults)])
def test_every_flipped_bit_is_seen(flips: int, folder: Path, trials: Callable, tally: Callable[..., None]) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]

    def trial(chance: random.Random) -> str:
        file = chance.choice(files)
        whole = file.read_bytes()
        spoiled = bytearray(whole)
        spoiled[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(spoiled)
        with pytest.raises(CheckpointError):
            verify_manifest(folder)
        file.write_bytes(whole)
        return file.name

    assert len(set(trials(flips, trial))) == len(files)
    verify_manifest(folder)
    tally("F4", "a flipped bit in a file of a checkpoint", "seen, every one", flips if flips == 1000 else 0)


def test_cut_grown_swapped_and_lost_files_are_passed_over(folder: Path, trials: Callable, tally: Callable[..., None]) -> None:
    """The newest checkpoint is damaged, the one before is resumed; with all of them damaged the run stops rather than start afresh."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1)
    older = checkpoint.steps(folder.parent)[0]

    def trial(chance: random.Random) -> None:
        file, other = chance.sample(files, 2)
        whole = file.read_bytes()
        kinds = [whole[: chance.randrange(len(whole))], whole + b"\0", other.read_bytes(), None]
        content = chance.choice(kinds)
        file.unlink() if content is None else file.write_bytes(content)
        assert checkpoint.latest(folder.parent) == older
        file.write_bytes(whole)

    trials(100, trial)
    assert checkpoint.latest(folder.parent) == folder
    for path in checkpoint.steps(folder.parent):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact:\n.*state.json is missing[^\n]*\n.*state.json is missing"):
        checkpoint.latest(folder.parent)
    tally("F4", "files of a checkpoint cut, grown, swapped or lost", "passed over for the one before; an error if none is whole", 100)


# ---- hostile folders, as somebody would publish them


class Bomb:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


def replace_with(name: str, content: bytes) -> Harm:
    return lambda folder, canary: (folder / name).write_bytes(content)


def pickled(protocol: int, name: str) -> Harm:
    return lambda folder, canary: (folder / name).write_bytes(pickle.dumps(Bomb(canary), protocol))


def torch_saved(name: str, zipped: bool) -> Harm:
    def harm(folder: Path, canary: Path) -> None:
        torch.save({"weight": Bomb(canary)}, folder / name, _use_new_zipfile_serialization=zipped)

    return harm


def only_a_pickle(harm: Harm) -> Harm:
    """Take the safetensors away, so that a reader could be tempted."""

    def tempting(folder: Path, canary: Path) -> None:
        harm(folder, canary)
        (folder / ADAPTER).unlink()

    return tempting


def numpy_objects(folder: Path, canary: Path) -> None:
    import numpy as np

    np.save(folder / "adapter_model.npy", np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    (folder / ADAPTER).write_bytes((folder / "adapter_model.npy").read_bytes())


def cut(name: str, keep: float) -> Harm:
    def harm(folder: Path, canary: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return harm


def header(change: Callable[[dict], object], name: str = ADAPTER) -> Harm:
    """Rewrite the header of a safetensors file."""

    def harm(folder: Path, canary: Path) -> None:
        content = (folder / name).read_bytes()
        size = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + size])
        change(table)
        encoded = json.dumps(table).encode()
        (folder / name).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])

    return harm


def tensors_of(table: dict) -> list[str]:
    return [name for name in table if name != "__metadata__"]


def overlap(table: dict) -> None:
    first, second = tensors_of(table)[:2]
    table[second]["data_offsets"] = table[first]["data_offsets"]


def beyond(table: dict) -> None:
    table[tensors_of(table)[-1]]["data_offsets"] = [0, 1 << 40]


def backwards(table: dict) -> None:
    table[tensors_of(table)[0]]["data_offsets"].reverse()


def overflow(table: dict) -> None:
    table[tensors_of(table)[0]]["shape"] = [1 << 62, 1 << 62]


def unknown_type(table: dict) -> None:
    table[tensors_of(table)[0]]["dtype"] = "F7"


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = ADAPTER) -> Harm:
    """Rewrite the tensors."""

    def harm(folder: Path, canary: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return harm


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda table: {name: change(value) if name == min(table) else value for name, value in table.items()}


def filled(value: float) -> Callable:
    return first(lambda tensor: torch.full_like(tensor, value))


def settings(name: str, **keys: object) -> Harm:
    def harm(folder: Path, canary: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))

    return harm


def zip_bomb(folder: Path, canary: Path) -> None:
    data = memory.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    (folder / ADAPTER).write_bytes(data.getvalue())


def linked(name: str, target: str) -> Harm:
    def harm(folder: Path, canary: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return harm


HOSTILE: dict[str, Harm] = {
    **{f"pickle-{protocol}": pickled(protocol, ADAPTER) for protocol in (0, 2, 5)},
    "pickle-in-config": pickled(2, CONFIG),
    "pickle-in-settings": pickled(2, "vlm2vec.json"),
    "pickle-as-state": only_a_pickle(pickled(2, "adapter_model.bin")),
    "torch-zip": only_a_pickle(torch_saved("adapter_model.bin", True)),
    "torch-legacy": only_a_pickle(torch_saved("adapter_model.bin", False)),
    "torch-pt": only_a_pickle(torch_saved("adapter_model.pt", True)),
    "torch-renamed": torch_saved(ADAPTER, True),
    "numpy-objects": numpy_objects,
    "zip-bomb": zip_bomb,
    "foreign-setting": settings("vlm2vec.json", model={"path": "/etc"}),
    "setting-of-another-type": settings("vlm2vec.json", model={"max_tokens": "many"}),
    "setting-out-of-range": settings("vlm2vec.json", model={"max_tokens": -1}),
    "list-settings": replace_with("vlm2vec.json", b"[]"),
    "base-list": settings("vlm2vec.json", base=[1]),
    "lfs": replace_with(ADAPTER, LFS),
    "lfs-config": replace_with(CONFIG, LFS),
    "html": replace_with(ADAPTER, HTML),
    "html-config": replace_with(CONFIG, HTML),
    "empty": replace_with(ADAPTER, b""),
    "empty-config": replace_with(CONFIG, b""),
    "list-config": replace_with(CONFIG, b"[1, 2]"),
    "deep-config": replace_with(CONFIG, b"[" * 100_000),
    "not-utf8": replace_with(CONFIG, b'{"peft_type": "\xff"}'),
    **{f"cut-{keep}": cut(ADAPTER, keep) for keep in (0.001, 0.1, 0.9, 0.999)},
    "header-huge": lambda folder, canary: (folder / ADAPTER).write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "header-no-json": lambda folder, canary: (folder / ADAPTER).write_bytes((8).to_bytes(8, "little") + b"not json"),
    "overlap": header(overlap),
    "beyond": header(beyond),
    "backwards": header(backwards),
    "overflow": header(overflow),
    "unknown-type": header(unknown_type),
    "extra-bytes": lambda folder, canary: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes() + b"\0" * 64),
    "integers": weights(first(lambda tensor: tensor.to(torch.int32))),
    "wrong-shape": weights(first(lambda tensor: tensor[:, :-1].contiguous() if tensor.ndim > 1 else tensor[:-1])),
    "transposed": weights(first(lambda tensor: tensor.T.contiguous() if tensor.ndim > 1 else torch.zeros(2, 2))),
    "wrong-rank": settings(CONFIG, r=8),
    "float64-too-large": weights(first(lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64))),
    "nan-of-8-bits": weights(first(lambda tensor: torch.full_like(tensor, float("nan")).to(torch.float8_e4m3fn))),
    "nan": weights(filled(float("nan"))),
    "inf": weights(filled(float("inf"))),
    "missing-key": weights(lambda table: {name: table[name] for name in sorted(table)[1:]}),
    "half-the-keys": weights(lambda table: {name: table[name] for name in sorted(table)[::2]}),
    "extra-key": weights(lambda table: table | {"base_model.model.evil.weight": torch.zeros(2)}),
    "renamed": weights(lambda table: {name.replace("model.", "model.model.", 1): value for name, value in table.items()}),
    "no-tensors": weights(lambda table: {}),
    "other-kind": settings(CONFIG, peft_type="IA3"),
    "no-such-base": settings("vlm2vec.json", base={"path": "/nowhere/at/all", "revision": None}),
    "link-to-device": linked(ADAPTER, "/dev/null"),
    "link-to-secret": linked(CONFIG, "/etc/passwd"),
}  # fmt: skip


def resume(folder: Path) -> None:
    """Go on from the damaged checkpoint, as if its manifest and recipe were right."""
    reseal(folder)
    (folder.parent / RECIPE).unlink()
    start_run(light_recipe(folder.parent, steps=6))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused(name: str, folder: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    """With a manifest that fits, since its author would write one; and nothing runs, whoever reads it."""
    assert len(HOSTILE) >= 40
    canary = tmp_path / "canary"
    HOSTILE[name](folder, canary)
    with pytest.raises(Vlm2VecError) as caught:
        Encoder.from_pretrained(folder)
    assert caught.value.exit_code == 2 and (folder.name in str(caught.value) or "/nowhere/at/all" in str(caught.value))
    tally("F4", "hostile or corrupt checkpoints, with a manifest that fits", "refused in words; nothing loaded, nothing executed", 1)
    if name == "link-to-secret":  # what a link leads to is no part of a checkpoint, so it is passed over for the one before
        reseal(folder)
        assert checkpoint.latest(folder.parent) == checkpoint.steps(folder.parent)[0]
        return
    with pytest.raises(Vlm2VecError) as caught:
        resume(folder)
    assert caught.value.exit_code == 2
    assert not canary.exists() and not [module for module in sys.modules if "evil" in module]


@pytest.mark.parametrize("model", [{"trust_remote_code": True}, {"trust_remote_code": True, "revision": "0" * 40}, {}])
def test_settings_beside_a_model_cannot_turn_on_its_code(model: dict, tmp_path: Path, tally: Callable[..., None]) -> None:
    folder, canary = Path(shutil.copytree(builtin_checkpoint("tiny-smolvlm"), tmp_path / "model")), tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass C: ...\nclass M: ...\n")
    code = {"AutoConfig": "modeling_evil.C", "AutoModelForImageTextToText": "modeling_evil.M"}
    settings("config.json", model_type="evil", auto_map=code)(folder, canary)
    (folder / "vlm2vec.json").write_text(json.dumps({"format": 1, "model": model}))
    with pytest.raises(ModelError, match="trust_remote_code|revision is no setting"):
        Encoder.from_pretrained(folder)
    assert not canary.exists()
    tally("F4", "a model with code, and settings beside it that say to trust it", "refused; nothing executed", 1)


STATE_FILE, LOSS, OPTIMIZER, PARTS = "state.json", "loss.safetensors", "optimizer.safetensors", "trained_parts.safetensors"
STEP, SQUARE = r"optimizer.safetensors: tensor \S+/step", r"optimizer.safetensors: tensor \S+/exp_avg_sq"
STRANGE = "made for another model or its keys were renamed"


def only(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Change the first tensor whose name ends so."""

    def altered(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        chosen = min(name for name in table if name.endswith(ending))
        return table | {chosen: change(table[chosen])}

    return altered


def moments(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Harm:
    return weights(change, OPTIMIZER)


def told(**keys: object) -> Harm:
    return settings(STATE_FILE, **keys)


def renamed(number: int, *others: Harm) -> Harm:
    """Call the folder as if it were of another step, after `others`; no other checkpoint stays."""

    def harm(folder: Path, canary: Path) -> None:
        for other in others:
            other(folder, canary)
        shutil.rmtree(checkpoint.steps(folder.parent)[0])
        folder.rename(folder.with_name(f"step-{number:06d}"))

    return harm


def of_step(number: int) -> Harm:
    """The whole state says that it is of another step."""

    def counted(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return table | {name: torch.tensor(float(number)) for name in table if name.endswith("/step")}

    return renamed(number, told(step=number), moments(counted))


# By name: what is done to the newest checkpoint, of step 4, and what the error says.
STATE: dict[str, tuple[Harm, str]] = {
    "state-not-json": (replace_with(STATE_FILE, b"{"), "state.json:1: not JSON"),
    "state-html": (replace_with(STATE_FILE, HTML), "state.json:1: not JSON"),
    "state-missing": (lambda folder, canary: (folder / STATE_FILE).unlink(), "state.json: cannot be read"),
    "state-without-step": (replace_with(STATE_FILE, b'{"format": 1}'), "state.json: key 'recipe_digest' is missing"),
    "state-list": (replace_with(STATE_FILE, b"[]"), "state.json: holds a list, not an object with format, step, recipe_digest"),
    "state-extra": (told(optimizer="evil"), "state.json: key 'optimizer' is unexpected"),
    "state-digest": (told(recipe_digest=None), "state.json: recipe_digest is None, not a string"),
    "state-step-text": (told(step="four"), "state.json: step is 'four', not an integer"),
    "state-step-bool": (told(step=True), "state.json: step is True, not an integer"),
    "state-step-float": (told(step=4.0), "state.json: step is 4.0, not an integer"),
    "state-step-null": (told(step=None), "state.json: step is None, not an integer"),
    "state-step-negative": (told(step=-4), "state.json: step is -4 but the folder is called step-000004"),
    "state-step-huge": (told(step=10**4000), "state.json: step is 1000+... but the folder is called step-000004"),
    "state-step-other": (told(step=400), "state.json: step is 400 but the folder is called step-000004"),
    "state-step-zero": (renamed(0, told(step=0)), rf"optimizer.safetensors: tensor \S+ is unexpected; .*{STRANGE}"),
    "folder-renamed": (renamed(400), "state.json: step is 4 but the folder is called step-000400; if you renamed it, rename it back"),
    "beyond-the-recipe": (of_step(400), "step-000400: beyond the last step of this recipe, 6"),
    "state-of-the-future": (told(format=99), "state.json: written in format 99; this version reads format 1, upgrade vlm2vec"),
    "state-of-the-future-with-more": (told(format=2, scheduler={}), "state.json: written in format 2; this version"),
    "state-format-zero": (told(format=0), "state.json: written in format 0;"),
    "state-format-bool": (told(format=True), "state.json: written in format True;"),
    "state-format-float": (told(format=1.0), "state.json: written in format 1.0;"),
    "optimizer-lost": (lambda folder, canary: (folder / OPTIMIZER).unlink(), "optimizer.safetensors: not found"),
    "optimizer-html": (replace_with(OPTIMIZER, HTML), "optimizer.safetensors: file is an HTML page"),
    "optimizer-lfs": (replace_with(OPTIMIZER, LFS), "optimizer.safetensors: file is a Git-LFS pointer"),
    "optimizer-pickle": (pickled(2, OPTIMIZER), "optimizer.safetensors: not a safetensors file"),
    "optimizer-cut": (cut(OPTIMIZER, 0.5), "optimizer.safetensors: truncated"),
    "optimizer-header": (header(overlap, OPTIMIZER), "optimizer.safetensors: not a readable safetensors file"),
    "optimizer-of-the-loss": (linked(OPTIMIZER, LOSS), rf"optimizer.safetensors: tensor \S+ is missing; .*{STRANGE}"),
    "optimizer-shape": (moments(first(lambda tensor: torch.zeros(3, 3))), r"optimizer.safetensors: tensor \S+/exp_avg has shape \(3, 3\)"),
    "optimizer-transposed": (moments(only("lora_A.default.weight/exp_avg", lambda tensor: tensor.T.contiguous())), "has shape"),
    "optimizer-nan": (moments(filled(float("nan"))), r"optimizer.safetensors: tensor \S+/exp_avg holds \d+ non-finite values"),
    "optimizer-inf": (moments(only("_sq", lambda tensor: tensor + float("inf"))), rf"{SQUARE} holds \d+ non-finite values"),
    "optimizer-integers": (moments(only("_sq", lambda tensor: tensor.int())), f"{SQUARE} holds int32, not float32"),
    "optimizer-half": (moments(only("_sq", lambda tensor: tensor.half())), f"{SQUARE} holds float16, not float32"),
    "optimizer-negative": (moments(only("_sq", lambda tensor: tensor - 1)), f"{SQUARE} holds -1, and is a mean of squares"),
    "optimizer-missing": (moments(lambda table: {name: table[name] for name in sorted(table)[3:]}), r"tensor \S+/exp_avg is missing"),
    "optimizer-no-squares": (moments(lambda table: {name: table[name] for name in table if "_sq" not in name}), f"{SQUARE} is missing"),
    "optimizer-no-step": (moments(lambda table: {name: table[name] for name in table if "/step" not in name}), f"{STEP} is missing"),
    "optimizer-empty": (moments(lambda table: {}), rf"optimizer.safetensors: tensor \S+ is missing; .*{STRANGE}"),
    "optimizer-extra": (moments(lambda table: table | {"encoder.evil/exp_avg": torch.zeros(1)}), "encoder.evil/exp_avg is unexpected"),
    "optimizer-max": (moments(lambda table: table | {"loss.log_temperature/max": torch.zeros(())}), "log_temperature/max is unexpected"),
    "optimizer-step-other": (moments(only("/step", lambda tensor: tensor + 1)), f"{STEP} is 5, but state.json is of step 4"),
    "optimizer-step-half": (moments(only("/step", lambda tensor: tensor - 0.5)), f"{STEP} is 3.5, but"),
    "optimizer-step-integer": (moments(only("/step", lambda tensor: tensor.long())), f"{STEP} holds int64, not float32"),
    "optimizer-step-by-element": (moments(only("/step", lambda tensor: tensor.repeat(4))), rf"{STEP} has shape \(4,\)"),
    "loss-html": (replace_with(LOSS, HTML), "loss.safetensors: file is an HTML page"),
    "loss-lost": (lambda folder, canary: (folder / LOSS).unlink(), "loss.safetensors: not found"),
    "loss-renamed": (weights(lambda table: {f"x{name}": value for name, value in table.items()}, LOSS), "log_temperature is missing"),
    "loss-extra": (weights(lambda table: table | {"evil": torch.zeros(1)}, LOSS), "loss.safetensors: tensor evil is unexpected"),
    "loss-shape": (weights(first(lambda tensor: tensor.repeat(2)), LOSS), r"loss.safetensors: tensor log_temperature has shape \(2,\)"),
    "loss-double": (weights(first(lambda tensor: tensor.double()), LOSS), "tensor log_temperature holds float64, not float32"),
    "loss-nan": (weights(filled(float("nan")), LOSS), "tensor log_temperature holds 1 non-finite values"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATE)
def test_a_hostile_state_is_refused(name: str, folder: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    harm, words = STATE[name]
    harm(folder, tmp_path / "canary")
    left = checkpoint.steps(folder.parent)[-1]
    with pytest.raises(CheckpointError, match=words) as caught:
        resume(left)
    assert caught.value.exit_code == 2 and left.name in str(caught.value) and not (tmp_path / "canary").exists()
    assert len(str(caught.value)) < 1000
    tally("F4", "training state that does not fit, with a manifest that fits", "refused in words", 1)


@pytest.mark.parametrize("name", [STATE_FILE, LOSS, OPTIMIZER])
def test_a_state_that_lies_elsewhere_is_passed_over(name: str, folder: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    """What a link leads to is no part of a checkpoint, however right it is."""
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    reseal(folder)
    assert checkpoint.latest(folder.parent) == checkpoint.steps(folder.parent)[0]
    tally("F4", "training state behind a link", "passed over for the checkpoint before", 1)


PARTLY: dict[str, tuple[Harm, str]] = {
    "html": (replace_with(PARTS, HTML), "trained_parts.safetensors: file is an HTML page"),
    "header": (header(overlap, PARTS), "trained_parts.safetensors: not a readable safetensors file"),
    "lost": (lambda folder, canary: (folder / PARTS).unlink(), r"trained_parts.safetensors: tensor \S+ is missing"),
    "missing": (weights(lambda table: {name: table[name] for name in sorted(table)[1:]}, PARTS), r"tensor \S+ is missing"),
    "nan": (weights(filled(float("nan")), PARTS), r"trained_parts.safetensors: tensor \S+ holds \d+ non-finite values"),
}


@pytest.fixture(scope="module")
def partly_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains the projector in full beside an adapter."""
    run_dir = tmp_path_factory.mktemp("partly") / "run"
    start_run(partly(run_dir, steps=3))
    return run_dir


def partly(run_dir: Path, steps: int) -> Recipe:
    return changed(light_recipe(run_dir, steps, lora="{rank: 4}"), "model", train=("projector",))


@pytest.mark.parametrize("name", PARTLY)
def test_parts_beside_an_adapter_are_all_there(name: str, partly_made: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    shutil.copytree(partly_made, tmp_path / "run")
    folder = checkpoint.steps(tmp_path / "run")[-1]
    harm, words = PARTLY[name]
    harm(folder, tmp_path / "canary")
    reseal(folder)
    (folder.parent / RECIPE).unlink()
    with pytest.raises(Vlm2VecError, match=words) as caught:
        start_run(partly(folder.parent, steps=5))
    assert caught.value.exit_code == 2
    tally("F4", "training state that does not fit, with a manifest that fits", "refused in words", 1)
