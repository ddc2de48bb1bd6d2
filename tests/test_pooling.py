"""Pooling reads the mask alone; normalizing gives float32 unit rows or an error."""

from __future__ import annotations

import pytest
import torch

from vlm2vec.errors import InputError, NonFiniteError
from vlm2vec.pooling import check_rows, normalize, pool


def padded(rows: list[torch.Tensor], side: str, width: int, junk: float = 7.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (L_i, D) as `hidden_BLD` and `mask_BL`, with junk on padding."""
    hidden = torch.full((len(rows), width, rows[0].shape[1]), junk)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        hidden[index, place], mask[index, place] = row, 1
    return hidden, mask


@pytest.fixture
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 5, generator=generator) for length in (1, 4, 6)]


@pytest.mark.parametrize("junk", [7.0, float("nan")])
@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_ignores_padding(rows: list[torch.Tensor], side: str, width: int, junk: float) -> None:
    hidden, mask = padded(rows, side, width, junk)
    torch.testing.assert_close(pool(hidden, mask, "last"), torch.stack([row[-1] for row in rows]), rtol=0, atol=0)
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack([row.mean(0) for row in rows]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_items_of_a_packed_row_are_pooled_apart(rows: list[torch.Tensor], dtype: torch.dtype) -> None:
    hidden, mask = torch.cat(rows)[None].to(dtype).requires_grad_(), padded(rows, "right", 6)[1]
    wide = torch.promote_types(dtype, torch.float32)
    apart = [row.to(dtype).to(wide) for row in rows]
    torch.testing.assert_close(pool(hidden, mask, "last"), torch.stack([row[-1] for row in apart]), rtol=0, atol=0)
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack([row.mean(0) for row in apart]))
    for how, share in (("last", [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]), ("mean", [1, *[1 / 4] * 4, *[1 / 6] * 6])):
        (gradient,) = torch.autograd.grad(pool(hidden, mask, how).sum(), hidden)
        torch.testing.assert_close(gradient[0, :, 0], torch.tensor(share, dtype=dtype))


def test_last_is_the_last_real_token_even_around_a_hole(rows: list[torch.Tensor]) -> None:
    hidden = torch.arange(10.0).view(1, 5, 2)
    assert pool(hidden, torch.tensor([[1, 0, 1, 0, 0]]), "last").tolist() == [[4.0, 5.0]]


@pytest.mark.parametrize("how", ["last", "mean"])
def test_half_precision_comes_back_as_float32(rows: list[torch.Tensor], how: str) -> None:
    hidden, mask = padded(rows, "right", 6)
    assert pool(hidden.bfloat16(), mask.bool(), how).dtype == torch.float32


def test_double_precision_is_kept(rows: list[torch.Tensor]) -> None:
    hidden, mask = padded(rows, "right", 6)
    assert all(normalize(pool(hidden.double(), mask, how)).dtype == torch.float64 for how in ("last", "mean"))


def test_mean_adds_up_in_float32() -> None:
    hidden = torch.ones(1, 4096, 1, dtype=torch.float16) * 100  # the sum leaves the range of float16
    assert pool(hidden, torch.ones(1, 4096), "mean").item() == 100


@pytest.mark.parametrize("how", ["last", "mean"])
def test_gradient_reaches_real_tokens_only(rows: list[torch.Tensor], how: str) -> None:
    hidden, mask = padded(rows, "right", 6)
    hidden.requires_grad_()
    pool(hidden, mask, how).sum().backward()
    assert hidden.grad is not None
    used = hidden.grad.abs().sum(-1) > 0
    expected = mask.bool() if how == "mean" else torch.nn.functional.one_hot(mask.sum(1) - 1, 6).bool()
    assert used.equal(expected)


@pytest.mark.parametrize("how", ["last", "mean"])
def test_a_row_without_tokens_is_refused_when_normalized(how: str) -> None:
    hidden, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(NonFiniteError, match="1 of 2 embeddings.*row 1"):
        check_rows(normalize(pool(hidden, mask, how)))


def test_unknown_pooling() -> None:
    with pytest.raises(InputError, match="expected last or mean, got 'cls'"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1), "cls")


def test_normalize_gives_float32_unit_rows() -> None:
    unit = normalize(torch.randn(50, 64).bfloat16() * 100)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e30])
def test_what_cannot_be_normalized_is_nan_and_refused(bad: float) -> None:
    embedding = torch.ones(3, 4)
    embedding[2] = bad
    unit = normalize(embedding)
    assert unit[2].isnan().all() and torch.equal(unit[:2], torch.full((2, 4), 0.5))
    with pytest.raises(NonFiniteError, match="1 of 3 embeddings are zero, infinite or not a number; the first is row 2"):
        check_rows(unit)
    check_rows(unit[:2])


def test_normalize_of_no_rows() -> None:
    assert normalize(torch.empty(0, 4)).shape == (0, 4)
