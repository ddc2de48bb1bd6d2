"""`EncodeBatch` in the hands of the tools that it is for."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.corpora import paint, png
from vlm2vec import Encoder
from vlm2vec.batched import EncodeBatch
from vlm2vec.errors import ImageError, InputError

MODEL = "builtin/tiny-qwen2_vl"
RED, BLUE = (200, 0, 0), (0, 0, 200)
TEXTS = ["one", "two words", "three more words"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_pretrained(MODEL, device="cpu")


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, dtype=np.float32), wanted.numpy(), atol=1e-6)


def test_columns_in_columns_out(encoder: Encoder) -> None:
    batch: dict[str, Any] = {"text": np.array(TEXTS), "n": [1, 2, 3]}
    made = EncodeBatch(MODEL, device="cpu")(batch)
    assert made["n"] == [1, 2, 3] and made["embedding"].shape == (3, 32) and made["embedding"].dtype == np.float32
    close(made["embedding"], encoder.encode(TEXTS))


def test_a_picture_in_every_form(tmp_path: Path, encoder: Encoder) -> None:
    file = paint(tmp_path / "r.png", RED)
    forms = [str(file), file, png(RED), {"bytes": png(RED), "path": "x"}, {"bytes": None, "path": str(file)}]
    forms += [Image.open(file), np.asarray(Image.open(file)), [str(file)], np.array([str(file)], dtype=object), np.str_(file)]
    found = EncodeBatch(MODEL, device="cpu", image="picture", output="v")({"picture": forms})["v"]
    close(found, encoder.encode([{"image": file}] * len(forms)))
    mixed = EncodeBatch(MODEL, device="cpu")({"image": [None, [str(file), None]], "text": ["a", None]})["embedding"]
    close(mixed, encoder.encode(["a", {"image": file}]))


def test_instructions(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = encoder.encode([{"text": "one", "instruction": "Own:"}, {"text": "two", "instruction": "Given:"}])
    batch = {"text": ["one", "two"], "instruction": ["Own:", None]}
    close(EncodeBatch(MODEL, device="cpu", instruction="Given:")(dict(batch))["embedding"], wanted)
    saved = Encoder.from_pretrained(MODEL, device="cpu")
    saved.query_instruction, saved.target_instruction = "Given:", "Other:"
    monkeypatch.setattr(Encoder, "from_pretrained", lambda *args, **options: saved)
    close(EncodeBatch(MODEL, role="query")(dict(batch))["embedding"], wanted)
    assert not np.allclose(EncodeBatch(MODEL, role="target")(dict(batch))["embedding"][1], wanted[1], atol=1e-4)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    encode = EncodeBatch(MODEL, device="cpu")
    with pytest.raises(InputError, match="neither a column 'text' nor 'image'; it has caption"):
        encode({"caption": ["a"]})
    with pytest.raises(InputError, match="neither text nor image"):
        encode({"text": ["a", None]})
    with pytest.raises(ImageError, match="gone.png': no such file"):
        encode({"image": [str(tmp_path / "gone.png")]})
    with pytest.raises(InputError, match="expected query or target, got 'querry'"):
        EncodeBatch(MODEL, role="querry")


def test_the_model_is_loaded_once_and_never_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    original = Encoder.from_pretrained
    monkeypatch.setattr(Encoder, "from_pretrained", lambda *args, **options: loads.append(args) or original(*args, **options))
    encode = EncodeBatch(MODEL, device="cpu")
    size = len(pickle.dumps(encode))
    first = encode({"text": TEXTS})["embedding"]
    encode({"text": TEXTS})
    assert len(loads) == 1 and len(pickle.dumps(encode)) == size < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(encode))({"text": TEXTS})["embedding"], first) and len(loads) == 2


@pytest.fixture
def on_two_threads() -> Iterator[None]:
    """Computes on two threads for at most two minutes, and puts back what `map` of datasets leaves a copy of."""
    threads, environ = torch.get_num_threads(), os.environ
    torch.set_num_threads(2)
    signal.alarm(120)
    yield
    signal.alarm(0)
    torch.set_num_threads(threads)
    os.environ = environ  # noqa: B003


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
@pytest.mark.parametrize("processes", [None, 2])
def test_in_a_map_of_datasets(tmp_path: Path, encoder: Encoder, processes: int | None, on_two_threads: None) -> None:
    """Its workers are forked from a process that computed on two threads."""
    import datasets

    file = paint(tmp_path / "b.png", BLUE)
    expected = encoder.encode([{"text": text, "image": file} for text in [*TEXTS, "four"]])
    table = datasets.Dataset.from_dict({"text": [*TEXTS, "four"], "image": [str(file)] * 4, "n": [1, 2, 3, 4]})
    table = table.cast_column("image", datasets.Image())
    made = table.map(EncodeBatch(MODEL, device="cpu"), batched=True, batch_size=2, num_proc=processes, with_rank=True)
    assert made.column_names == ["text", "image", "n", "embedding"] and made["n"][:] == [1, 2, 3, 4]
    close(made["embedding"][:], expected)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_in_map_batches_of_ray(encoder: Encoder) -> None:
    import ray

    rows = ray.data.from_items([{"text": text} for text in TEXTS])
    made = rows.map_batches(EncodeBatch, fn_constructor_kwargs={"model": MODEL, "device": "cpu"}, concurrency=1, batch_size=2).take_all()
    close([row["embedding"] for row in sorted(made, key=lambda row: TEXTS.index(row["text"]))], encoder.encode(TEXTS))
