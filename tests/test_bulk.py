"""A corpus encoded in bulk: the right row for every item, however often it is killed, however many processes share it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.corpora import DIMS, Hashing, content, expected, jsonl, paint, rows_by_id, texts
from vlm2vec import Encoder, bulk, io
from vlm2vec.bulk import ahead, encode_corpus, estimate
from vlm2vec.errors import DataError, EnvError, InputError, Interrupted, NonFiniteError, RunLockedError
from vlm2vec.signals import StopSignal

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def encode(source: Path, to: Path, encoder: Any = None, **options: Any) -> dict[str, Any]:
    return encode_corpus(encoder or Hashing(), source, to, **{"shard_items": 4, **options})


# -- rows --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["safetensors", "numpy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_gets_its_own_row(tmp_path: Path, workers: int, storage: str) -> None:
    paint(tmp_path / "r.png", RED)
    paint(tmp_path / "b.png", BLUE)
    rows: list[Any] = [{"text": f"number {index}", "id": f"n{index}"} for index in range(20)]
    rows[3] = {"image": "r.png", "id": "red"}
    rows[18] = {"text": "two", "image": ["r.png", "b.png"], "instruction": "Own:", "id": "both"}
    made = encode(jsonl(tmp_path / "c.jsonl", rows), tmp_path / "v", instruction="Say:", workers=workers, storage=storage)
    found = rows_by_id(tmp_path / "v")
    assert list(found) == [row["id"] for row in rows] and made["rows"] == 20 and len(made["shards"]) == 5
    assert np.array_equal(found["n7"], expected("Say: number 7\n"))
    assert np.array_equal(found["red"], expected("<|image_1|>\nSay:\n", RED))
    assert np.array_equal(found["both"], expected("<|image_1|>\n<|image_2|>\nOwn: two\n", RED, BLUE))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_are_other_processes(tmp_path: Path, workers: int) -> None:
    encoder, here = Hashing(), []
    original = encoder.processor.features
    encoder.processor.features = lambda *given: here.append(1) or original(*given)
    encode(texts(tmp_path / "c.jsonl", 6), tmp_path / "v", encoder, workers=workers)
    assert len(here) == (0 if workers else 6)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name, colour in {"a.png": RED, "sub/b": GREEN, "sub/c.png": BLUE}.items():
        paint(tmp_path / "in" / name, colour)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    encode(tmp_path / "in", tmp_path / "in" / "vectors", shard_items=2)  # inside what it reads
    found = rows_by_id(tmp_path / "in" / "vectors")
    assert list(found) == ["a.png", "sub/b", "sub/c.png"] and np.array_equal(found["sub/b"], expected("<|image_1|>\n", GREEN))
    before = content(tmp_path / "in" / "vectors")
    assert [json.loads(line)["path"] for line in before["pictures.jsonl"].splitlines()] == list(found)
    assert not any(name.startswith(".") for name in before)
    again = Hashing()
    encode(tmp_path / "in", tmp_path / "in" / "vectors", again, shard_items=2)
    assert again.encoded == 0 and content(tmp_path / "in" / "vectors") == before


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_smaller_rows(tmp_path: Path, precision: str) -> None:
    encode(texts(tmp_path / "c.jsonl", 6), tmp_path / "v", precision=precision, dims=10)
    wanted = expected("text 3")[:10]
    wanted /= np.linalg.norm(wanted)
    bound = {"float16": 2.0**-12, "int8": np.abs(wanted).max() / 254 * 1.0001, "binary": 1.0}[precision]
    found = rows_by_id(tmp_path / "v")["t3"]
    assert found.shape == (10,) and np.abs(found - wanted).max() <= bound and (np.sign(found) == np.sign(wanted)).all()


def test_windows_do_not_change_a_row_and_bound_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Hashing.embed_features
    monkeypatch.setattr(Hashing, "embed_features", lambda self, window, chunk: seen.append(len(window)) or original(self, window, chunk))
    source = texts(tmp_path / "c.jsonl", 23)
    encode(source, tmp_path / "one", shard_items=10)
    monkeypatch.setattr(bulk, "WINDOW_ITEMS", 4)
    encode(source, tmp_path / "two", shard_items=10)
    monkeypatch.setattr(bulk, "WINDOW_BYTES", 100)  # passed by the third token row of 48 bytes ("text 9"), the second of 56 ("text 10")
    encode(source, tmp_path / "three", shard_items=10)
    assert seen == [10, 10, 3] + [4, 4, 2, 4, 4, 2, 3] + [3, 3, 3, 1, 2, 2, 2, 2, 2, 2, 1]
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


def test_ahead_gives_the_same_values_one_early() -> None:
    fetched = [threading.Event() for _ in range(4)]

    def counting() -> Any:
        for value, event in enumerate(fetched):
            event.set()
            yield value
        raise DataError("behind the last")

    seen = []
    with pytest.raises(DataError, match="behind the last"):
        for value in ahead(counting()):
            assert value == 3 or fetched[value + 1].wait(10)
            seen.append(value)
    assert seen == [0, 1, 2, 3]


# -- kills -------------------------------------------------------------------------------------------------------------------------------


def whole(folder: Path) -> None:
    """Every shard that can be seen has all its rows, all its ids, and both agree with the corpus of `texts`."""
    from safetensors.numpy import load_file

    for file in folder.glob("part-*.safetensors"):
        rows = load_file(file)["embeddings"]
        ids = [json.loads(line) for line in file.with_suffix(".ids.jsonl").read_text().splitlines()]
        assert len(rows) == len(ids) > 0
        assert all(np.array_equal(row, expected("text " + each[1:])) for each, row in zip(ids, rows, strict=True))


def killed(source: Path, to: Path, fault: str) -> None:
    os.environ["VLM2VEC_FAULT"] = fault
    encode(source, to)


def test_killed_at_every_point_it_goes_on_to_the_same_bytes(tmp_path: Path, forked: Callable[..., int]) -> None:
    source = texts(tmp_path / "c.jsonl", 6)
    encode(source, tmp_path / "whole")
    wanted, point = content(tmp_path / "whole"), 0
    while True:
        point += 1
        folder = tmp_path / f"killed-{point}"
        code = forked(killed, source, folder, f"*:{point}:kill")
        whole(folder)
        done = sum(1 for _ in folder.glob("part-?????.json"))
        encoder = Hashing()
        encode(source, folder, encoder)
        assert {name: data for name, data in content(folder).items() if not name.endswith(".tmp")} == wanted
        assert encoder.encoded == 6 - min(4 * done, 6), "a finished shard is not encoded again"
        if code == 0:
            break
        assert code == -9
    assert point > 45  # plan, 2 shards of 3 files, list, manifest, each with five points or more


def test_killed_again_and_again_it_still_ends(tmp_path: Path, forked: Callable[..., int]) -> None:
    source = texts(tmp_path / "c.jsonl", 10)
    encode(source, tmp_path / "whole")
    kills = 0
    while code := forked(killed, source, tmp_path / "v", "*:19:kill"):  # a shard takes 15 points: each run brings one
        kills += 1
        assert code == -9 and kills < 10
    found = {name: data for name, data in content(tmp_path / "v").items() if not name.endswith(".tmp")}
    assert kills >= 2 and found == content(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_between_windows(
    tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch, forked: Callable[..., int]
) -> None:
    source, original = texts(tmp_path / "c.jsonl", 10), Hashing.embed_features

    def signalled(self: Hashing, window: Any, chunk: int) -> Any:
        if self.encoded == 4:
            os.kill(os.getpid(), number)
        return original(self, window, chunk)

    def stopped() -> None:
        with StopSignal() as stop, pytest.raises(Interrupted, match="stopped in part-00001; run the same command") as caught:
            encode(source, tmp_path / "v", stop=stop)
        os._exit(caught.value.exit_code)

    with monkeypatch.context() as patch:
        patch.setattr(Hashing, "embed_features", signalled)
        assert forked(stopped) == code
    encoder = Hashing()
    encode(source, tmp_path / "v", encoder)
    assert encoder.encoded == 6


@pytest.mark.parametrize("point", ["after-write:1", "after-write:4", "before-rename:3", "before-fsync:7", "after-write:12"])
def test_a_full_disk_is_said_and_the_command_goes_on(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = texts(tmp_path / "c.jsonl", 10)
    encode(source, tmp_path / "whole")
    monkeypatch.setenv("VLM2VEC_FAULT", f"{point}:enospc")
    with pytest.raises(EnvError, match="No space left"):
        encode(source, tmp_path / "v")
    monkeypatch.delenv("VLM2VEC_FAULT")
    encode(source, tmp_path / "v")
    assert content(tmp_path / "v") == content(tmp_path / "whole")


def test_a_damaged_shard_alone_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = texts(tmp_path / "c.jsonl", 10)
    encode(source, tmp_path / "v")
    before = content(tmp_path / "v")
    (tmp_path / "v" / "part-00001.safetensors").write_bytes(b"x" * 900)
    encoder = Hashing()
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        encode(source, tmp_path / "v", encoder)
    assert encoder.encoded == 4 and "part-00001.safetensors" in caplog.text and content(tmp_path / "v") == before


# -- ranks -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    torch.set_num_threads(1)
    return Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu")


def test_two_ranks_make_the_bytes_of_one(tmp_path: Path, tiny: Encoder, ranks: Callable[..., None]) -> None:
    for name, colour in {"r.png": RED, "g.png": GREEN}.items():
        paint(tmp_path / name, colour)
    rows = [{"text": "word " * (index % 7 + 1), **({"image": "rg"[index % 2] + ".png"} if index % 3 == 0 else {})} for index in range(22)]
    rows[5] = {"image": "missing.png"}
    source = jsonl(tmp_path / "c.jsonl", rows)
    options: dict[str, Any] = {"chunk_tokens": 60, "skip_bad": True}
    encode(source, tmp_path / "one", tiny, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for world in (2, 3):
        ranks(lambda rank: encode(source, tmp_path / str(world), tiny, **options), world)  # noqa: B023
        assert content(tmp_path / str(world)) == content(tmp_path / "one")
    torch.set_num_threads(before)
    found = rows_by_id(tmp_path / "one")
    assert len(found) == 21 and np.allclose(found[4], tiny.encode([rows[4]])[0], atol=1e-6)
    assert np.allclose(found[6], tiny.encode([{"text": rows[6]["text"], "image": tmp_path / "r.png"}])[0], atol=1e-6)


def test_a_rank_encodes_its_own_shards_only(tmp_path: Path, ranks: Callable[..., None]) -> None:
    source = texts(tmp_path / "c.jsonl", 20)

    def share(rank: int) -> None:
        encoder = Hashing()
        encode(source, tmp_path / "v", encoder)
        assert encoder.encoded == (12, 8)[rank]

    ranks(share)


def test_another_number_of_ranks_goes_on(tmp_path: Path, forked: Callable[..., int], ranks: Callable[..., None]) -> None:
    source = texts(tmp_path / "c.jsonl", 20)
    encode(source, tmp_path / "whole")
    assert forked(killed, source, tmp_path / "v", "*:40:kill") == -9
    ranks(lambda rank: encode(source, tmp_path / "v"), 3)
    assert {name: data for name, data in content(tmp_path / "v").items() if not name.endswith(".tmp")} == content(tmp_path / "whole")


@pytest.mark.parametrize("row", [2, 6])  # of the first rank, of the second
def test_what_is_wrong_on_one_rank_ends_all(tmp_path: Path, row: int, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.ranks import fork_ranks

    source = jsonl(tmp_path / "c.jsonl", [{"image": "gone.png"} if index == row else f"t{index}" for index in range(8)])

    def share(rank: int) -> None:
        try:
            encode(source, tmp_path / "v")
        except Exception as error:
            os._exit(getattr(error, "exit_code", 1))

    assert fork_ranks(share, 2) == [2, 2]


def test_a_refusal_is_the_same_on_all_ranks(tmp_path: Path, ranks: Callable[..., None]) -> None:
    encode(texts(tmp_path / "c.jsonl", 6), tmp_path / "v")

    def share(rank: int) -> None:
        with pytest.raises(InputError, match="another input.digest: .*; input.items: 6 there, 7 here"):
            encode(texts(tmp_path / f"{rank}" / "c.jsonl", 7), tmp_path / "v")

    ranks(share)


# -- refusals ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"encoder": Hashing("other")}, 'model.fingerprint: "hashing" there, "other" here'),
        ({"instruction": "Find:"}, "instruction"),
        ({"precision": "int8"}, "precision"),
        ({"dims": 8}, "dims"),
        ({"storage": "numpy"}, "storage"),
        ({"shard_items": 5}, "shard_items"),
        ({"columns": {"text": "id"}}, "input.columns.text"),
        ({"images": "/"}, "input.images"),
    ],
)
def test_other_work_in_the_same_folder_is_refused(tmp_path: Path, changed: dict[str, Any], field: str) -> None:
    source = texts(tmp_path / "c.jsonl", 6)
    encode(source, tmp_path / "v")
    before = content(tmp_path / "v")
    with pytest.raises(InputError, match=f"was begun with another {field}"):
        encode(source, tmp_path / "v", **changed)
    assert content(tmp_path / "v") == before


def test_another_input_is_refused(tmp_path: Path) -> None:
    encode(texts(tmp_path / "c.jsonl", 6), tmp_path / "v")
    with pytest.raises(InputError, match="was begun with another input.digest"):
        encode(jsonl(tmp_path / "c.jsonl", ["a", "b", "c", "d", "e", "f"]), tmp_path / "v")


def test_what_does_not_change_a_row_may_change(tmp_path: Path) -> None:
    source = texts(tmp_path / "c.jsonl", 6)
    encode(source, tmp_path / "v")
    encoder = Hashing()
    encode(source, tmp_path / "v", encoder, chunk_tokens=7, workers=1, skip_bad=True)
    assert encoder.encoded == 0


def test_a_folder_in_use_is_locked(tmp_path: Path, forked: Callable[..., int]) -> None:
    def other() -> None:
        with pytest.raises(RunLockedError):
            encode(texts(tmp_path / "c.jsonl", 2), tmp_path / "v")

    with io.run_lock(tmp_path / "v"):
        assert forked(other) == 0


@pytest.mark.parametrize("dims", [0, DIMS + 1])
def test_dims_that_the_model_does_not_have(tmp_path: Path, dims: int) -> None:
    with pytest.raises(InputError, match=f"dims: expected 1 to {DIMS}"):
        encode(texts(tmp_path / "c.jsonl", 2), tmp_path / "v", dims=dims)


def test_an_embedding_that_is_none_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Hashing, window: Any, chunk: int) -> Any:
        raise NonFiniteError("1 of 4 embeddings are NaN")

    monkeypatch.setattr(Hashing, "embed_features", broken)
    with pytest.raises(NonFiniteError, match=r"between .*c.jsonl row 0 \(line 1\) and .*c.jsonl row 3 \(line 4\): 1 of 4"):
        encode(texts(tmp_path / "c.jsonl", 6), tmp_path / "v")


def test_an_input_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = texts(tmp_path / "c.jsonl", 6)
    original = bulk._Job.outcomes

    def shrinking(self: Any, todo: Any) -> Any:
        texts(source, 5)
        return original(self, todo)

    monkeypatch.setattr(bulk._Job, "outcomes", shrinking)
    with pytest.raises(DataError, match="ended 1 rows early"):
        encode(source, tmp_path / "v")


# -- what cannot be read -----------------------------------------------------------------------------------------------------------------


def bad_corpus(tmp_path: Path) -> Path:
    paint(tmp_path / "good.png", RED)
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:48])
    lines = ['"a"', '{"image": "good.png"}', '{"image": "torn.png", "id": "torn"}', "{", '{"text": ""}', '{"image": "gone.png"}', '"g"']
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    return tmp_path / "c.jsonl"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_stops_and_is_named(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"c.jsonl row 2 \(line 3\): image 'torn.png': image file is truncated .*--skip-bad") as caught:
        encode(bad_corpus(tmp_path), tmp_path / "v", workers=workers)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_cannot_be_read_are_left_out_and_listed(tmp_path: Path, workers: int) -> None:
    made = encode(bad_corpus(tmp_path), tmp_path / "v", workers=workers, skip_bad=True, shard_items=3)
    assert (made["rows"], made["skipped"], [part["rows"] for part in made["shards"]]) == (3, 4, [2, 0, 1])
    assert list(rows_by_id(tmp_path / "v")) == [0, 1, 6]
    skipped = io.read_jsonl(tmp_path / "v" / "skipped.jsonl")
    assert [(line["row"], line["id"]) for line in skipped] == [(2, "torn"), (3, 3), (4, 4), (5, 5)]
    for line, words in zip(skipped, ("truncated or damaged", "not valid JSON", "both are empty", "no such file"), strict=True):
        assert words in line["reason"]


# -- size --------------------------------------------------------------------------------------------------------------------------------


def test_an_estimate_writes_nothing(tmp_path: Path) -> None:
    paint(tmp_path / "in" / "a.png", RED)
    paint(tmp_path / "in" / "b.png", RED)
    found = estimate(Hashing(), tmp_path / "in", precision="int8", dims=9, shard_items=1)
    assert (found.kind, found.items, found.shards, found.dims, found.bytes) == ("pictures", 2, 2, 9, 2 * (9 + 4))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "in"]


MEMORY = """
import resource, sys
from tests.corpora import Hashing
from vlm2vec.bulk import encode_corpus

for source in sys.argv[1:]:
    encode_corpus(Hashing(), source, source + ".vectors", shard_items=512)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """20,000 texts of 1,000 characters, 20 MB of text and 160 MB of tokens, take at most 16 MB more than the first 2,000 of them."""
    lines = [{"text": f"{index} " + "x" * 1000, "id": f"id-{index}"} for index in range(20_000)]
    sources = [jsonl(tmp_path / "small.jsonl", lines[:2000]), jsonl(tmp_path / "large.jsonl", lines)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once: the question is what is held
    command = [sys.executable, "-c", MEMORY, *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = map(int, done.stdout.split())
    assert large - small <= 16_000, (small, large)
