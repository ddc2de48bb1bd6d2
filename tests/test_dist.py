"""Collectives in two gloo processes, forked: a tenth of a second each, torch is imported once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlm2vec import dist
from vlm2vec.errors import DataError, EnvError

Ranks = Callable[..., None]


def test_without_a_group_there_is_one_rank() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    grad = torch.ones(3)
    dist.barrier()
    dist.all_reduce_sum([grad])
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert dist.gather_rows(rows) == (rows, 0)
    assert dist.gather_objects(("a", 1)) == [("a", 1)]
    assert (dist.any_rank(True), dist.any_rank(False)) == (True, False)
    assert torch.equal(grad, torch.ones(3))


def test_ranks_know_themselves(ranks: Ranks) -> None:
    def check(rank: int) -> None:
        assert (dist.rank(), dist.world_size(), dist.is_main()) == (rank, 3, rank == 0)
        dist.barrier()

    ranks(check, world=3)


@pytest.mark.parametrize("counts", [(2, 2), (1, 4), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_rows_are_gathered_in_rank_order_whatever_their_number(ranks: Ranks, counts: tuple[int, int], dtype: torch.dtype) -> None:
    parts = [torch.arange(count * 6).reshape(count, 2, 3).to(dtype) + 50 * rank for rank, count in enumerate(counts)]

    def check(rank: int) -> None:
        rows, offset = dist.gather_rows(parts[rank])
        assert rows.dtype == dtype
        assert torch.equal(rows, torch.cat(parts))
        assert torch.equal(rows[offset : offset + counts[rank]], parts[rank])

    ranks(check)


def test_gathered_loss_has_the_gradient_of_one_process(ranks: Ranks) -> None:
    """Each rank computes the loss of all rows; the parameter gradients, summed over ranks, are those of a single process."""
    torch.manual_seed(0)
    inputs, weight, counts = torch.randn(5, 4), torch.randn(4, 3), (2, 3)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(rows @ rows.T, dim=1).sum()

    reference = weight.clone().requires_grad_()
    loss_of(inputs @ reference).backward()

    def check(rank: int) -> None:
        mine = weight.clone().requires_grad_()
        rows, _ = dist.gather_rows(inputs.split(counts)[rank] @ mine)
        loss_of(rows).backward()
        assert mine.grad is not None and mine.grad.abs().sum() > 0
        assert not torch.allclose(mine.grad, reference.grad)
        dist.all_reduce_sum([mine.grad])
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-6)

    ranks(check)


@pytest.mark.parametrize("bucket", [1, 40, 1 << 20])
def test_sums_are_in_place_over_any_mix_of_tensors(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    monkeypatch.setattr(dist, "BUCKET_BYTES", bucket)

    def make(factor: int) -> list[torch.Tensor]:
        mixed = [torch.ones(2, 3), torch.tensor(5.0), torch.ones(4, dtype=torch.float64), torch.zeros(0), torch.ones(3, 2).T]
        return [tensor * factor for tensor in (*mixed, torch.arange(4))]

    def check(rank: int) -> None:
        tensors = make(rank + 1)
        addresses = [tensor.data_ptr() for tensor in tensors]
        dist.all_reduce_sum(tensors)
        for tensor, expected in zip(tensors, make(1 + 2), strict=True):
            assert torch.equal(tensor, expected)
        assert [tensor.data_ptr() for tensor in tensors] == addresses
        dist.all_reduce_sum([])

    ranks(check)


def test_buckets_hold_all_tensors_in_order() -> None:
    tensors = [torch.zeros(size) for size in (10, 20, 30_000_000, 5, 5)] + [torch.zeros(3, dtype=torch.float64)]
    sizes = [[tensor.numel() for tensor in bucket] for bucket in dist._buckets(tensors)]
    assert sizes == [[10, 20], [30_000_000], [5, 5], [3]]


def test_objects_of_all_ranks(ranks: Ranks) -> None:
    def check(rank: int) -> None:
        mine = {"rank": rank, "ids": ["a:1", "ü\n\u2028"] * (1 + 100 * rank), "none": None}
        found = dist.gather_objects(mine)
        assert found[rank] == mine
        assert [one["rank"] for one in found] == [0, 1, 2]
        assert [len(one["ids"]) for one in found] == [2, 202, 402]
        with pytest.raises(TypeError):
            dist.gather_objects(object())

    ranks(check, world=3)


def test_one_flag_is_seen_by_all(ranks: Ranks) -> None:
    def check(rank: int) -> None:
        assert dist.any_rank(rank == 1) is True
        assert dist.any_rank(False) is False
        assert dist.any_rank(True) is True

    ranks(check)


def test_numbers_are_compared_over_ranks(ranks: Ranks) -> None:
    def check(rank: int) -> None:
        assert (dist.highest(rank * 5), dist.lowest(rank - 3)) == (10, -3)

    assert (dist.highest(7), dist.lowest(7)) == (7, 7)
    ranks(check, world=3)


def test_all_ranks_end_as_the_lowest_that_fails(ranks: Ranks) -> None:
    def check(rank: int) -> None:
        with pytest.raises(EnvError, match="^disk full$" if rank == 1 else "^rank 1: disk full$"), dist.agreeing():
            if rank == 1:
                raise EnvError("disk full")
            if rank == 2:
                raise DataError("too late")
        with dist.agreeing():
            dist.rank()
        dist.barrier()

    with pytest.raises(EnvError, match="^alone$"), dist.agreeing():
        raise EnvError("alone")
    ranks(check, world=3)


@pytest.mark.parametrize(
    ("backend", "device"), [("gloo", "cpu"), ("nccl", "cuda:3"), ("cuda:nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cpu"), ("mpi", "cpu")]
)
def test_small_messages_live_where_the_backend_takes_them(monkeypatch: pytest.MonkeyPatch, backend: str, device: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert dist._device() == torch.device(device)
