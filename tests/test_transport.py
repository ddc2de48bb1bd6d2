"""What comes from a worker is what it made, in one piece of memory that leaves nothing behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backbones.common import mixed_items
from tests.transported import ITEMS, Large, Made, item, open_files
from vlm2vec import transport
from vlm2vec.backbones import load_backbone, registry
from vlm2vec.batch import Batch
from vlm2vec.collate import Features
from vlm2vec.config import ModelConfig
from vlm2vec.data.bad import BadPair
from vlm2vec.errors import ImageError
from vlm2vec.transport import ALIGN, pack, read_ahead, unpack


def same(one: Any, other: Any) -> bool:
    """Equal values, with tensors of equal dtype, shape and bits."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return same(vars(one), vars(other)) if isinstance(one, Features | Batch) else bool(one == other)


def tensors(features: list[Features]) -> list[Tensor]:
    return [tensor for row in features for tensor in (row.input_ids, *(value for image in row.images for value in image.values()))]


@pytest.mark.parametrize("model_type", sorted(registry()))
def test_the_features_of_every_family_arrive_as_they_were(model_type: str) -> None:
    made = mixed_items(load_backbone(ModelConfig(path=f"builtin/tiny-{model_type}")))
    packed = pack(made)
    arrived = unpack(packed)
    assert same(arrived, made) and {tensor.untyped_storage().data_ptr() for tensor in tensors(arrived)} == {packed.flat.data_ptr()}


DTYPES = [torch.int64, torch.int32, torch.uint8, torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (0, 3), (3, 0, 2), (7, 3)])
def test_every_dtype_and_shape_lies_aligned_and_apart(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = [(torch.randn(shape) * 9).to(dtype) for _ in range(3)] + [torch.randn(4, 6).to(dtype).T, torch.ones(2, dtype=torch.bool)]
    arrived = unpack(pack(made))
    assert same(arrived, made)
    assert all(tensor.is_contiguous() and tensor.data_ptr() % ALIGN == 0 for tensor in arrived)
    for tensor in arrived:
        tensor.zero_()  # a view that reached into its neighbour would change it
    arrived[3].copy_(made[3])
    assert not any(tensor.any() for tensor in (*arrived[:3], arrived[4]))


def test_a_batch_keeps_what_is_no_tensor() -> None:
    rows = torch.tensor([0, 1])
    batch = Batch([item(0, 3), item(0, 0)], rows, rows, rows.flip(0), rows[:0], ["s:0", "s:1"], [BadPair("s:2", "gone", "s:0")])
    assert same(unpack(pack(batch)), batch)
    assert unpack(pack([])) == [] and unpack(pack("no tensor at all")) == "no tensor at all"


def test_without_workers_nothing_is_copied() -> None:
    values = [[torch.ones(1)], [torch.zeros(2)]]
    for made, arrived in zip(values, read_ahead(values, range(2), 0), strict=True):  # type: ignore[arg-type]
        assert made is arrived


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_send_values_in_order_and_errors_too(method: str, workers: int) -> None:
    for index, arrived in enumerate(read_ahead(Made(fails=True), range(5), workers, multiprocessing_context=method)):
        if index == 2:
            assert isinstance(arrived, ImageError) and str(arrived) == "row 2: image 'x.png': not an image"
        else:
            assert arrived[0] != os.getpid() and same(arrived[1], [item(index, number) for number in range(ITEMS)])


def test_files_stay_few_and_memory_goes_with_its_batch(forked: Callable[..., int]) -> None:
    """In a process that may have 128 files open, while a batch has 1,200 tensors of together 2 MB."""
    assert forked(few_files) == 0


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    named, before = os.listdir("/dev/shm"), shared_memory()
    files, held = [], []
    for theirs, arrived in read_ahead(Large(), range(24), 2, timeout=30):
        assert sum(float(tensor.sum()) for tensor in tensors(arrived)) == ITEMS * (6 + 1250 + 1)
        files.append((open_files(), int(theirs)))
        held.append(shared_memory() - before)
    for counts in zip(*files[4:], strict=True):  # here, and in the workers
        assert max(counts) - min(counts) <= 6 and max(counts) < 64, files
    assert 2e6 < max(held) < 10e6, held
    del theirs, arrived
    assert shared_memory() - before < 5e5
    assert os.listdir("/dev/shm") == named


def shared_memory() -> int:
    """Bytes of shared memory that this process has looked at and still holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) * 1024


def test_what_arrived_outlives_its_worker_and_what_did_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds between looks at late workers; usually 5
    named = os.listdir("/dev/shm")
    values = read_ahead(Made(), range(1000), 1)
    worker, first = next(values)
    with pytest.raises((RuntimeError, OSError, EOFError)):
        os.kill(int(worker), signal.SIGKILL)
        for _ in values:
            time.sleep(0.01)
    assert same(first, [item(0, number) for number in range(ITEMS)])
    del values
    assert os.listdir("/dev/shm") == named


def test_systems_without_nameless_memory_send_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    for index, (_, arrived) in enumerate(read_ahead(Made(), range(3), 1)):
        assert same(arrived, [item(index, number) for number in range(ITEMS)])


def test_workers_outlive_the_first_signal_to_the_whole_group(forked: Callable[..., int]) -> None:
    def child() -> None:
        transport._patient(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)

    assert forked(child) == -signal.SIGTERM


def test_workers_end_at_once_where_an_error_is_garbage_in_a_circle() -> None:
    values: list[Any] = [read_ahead(Made(), range(4), 1)]
    next(values[0])
    (worker,) = multiprocessing.active_children()
    values.append(values)
    del values
    gc.collect()
    assert worker.exitcode == 0
