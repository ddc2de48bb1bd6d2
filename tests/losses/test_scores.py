"""Scores in tiles against the whole matrix, in float64."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlm2vec.losses.related import Related
from vlm2vec.losses.scores import Scores

POSITIVE = torch.tensor([0, 1, 2, 3, 0, 5, 6])
TARGET_ID = torch.tensor([1, 2, 3, 1, 4, 5, 6, 7, 8])  # columns 0 and 3 are copies, 4, 7 and 8 are nobody's
QUERY_ID = torch.tensor([1, 2, 3, 4, 2, 6, 6])  # rows 1 and 4 are one query, and so are 5 and 6


def rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def inputs(tau: float = 0.1) -> list[Tensor]:
    return [each.requires_grad_() for each in (rows(7, 1), rows(9, 2), torch.tensor(tau, dtype=torch.float64))]


def find(side: int, target_id: Tensor = TARGET_ID, query_id: Tensor = QUERY_ID) -> Related:
    return Related.find(POSITIVE, target_id, query_id, side, torch.float64)


def whole(query_BD: Tensor, target_ND: Tensor, temperature: Tensor, related: Related) -> tuple[Tensor, ...]:
    score_BN = query_BD @ target_ND.T / temperature
    related_BN = torch.zeros_like(score_BN, dtype=torch.bool)
    related_BN[related.row_E, related.column_E] = True
    rest_BN = score_BN.masked_fill(related_BN, -math.inf)
    by_row, by_column = rest_BN + related.target_part_N.log(), rest_BN + related.query_part_B.log()[:, None]
    return score_BN[related.row_E, related.column_E], by_row.logsumexp(1), by_column.logsumexp(0), rest_BN.amax(1).detach()


@pytest.mark.parametrize("tau", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("side", [1, 2, 4, 100])
def test_values_and_gradients_are_those_of_the_matrix(side: int, tau: float) -> None:
    found, gradients = [], []
    for compute in (lambda *given: Scores.apply(*given, True), whole):
        given = inputs(tau)
        outputs = compute(*given, find(side))
        weight = torch.Generator().manual_seed(3)
        sum((out * torch.randn(out.shape, generator=weight, dtype=out.dtype)).sum() for out in outputs[:3]).backward()
        found.append(outputs)
        gradients.append([each.grad for each in given])
    for one, other in itertools.chain(zip(*found, strict=True), zip(*gradients, strict=True)):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("side", [2, 100])
@pytest.mark.parametrize("columns", [False, True])
def test_gradient_by_finite_differences(columns: bool, side: int) -> None:
    related = find(side)
    assert torch.autograd.gradcheck(lambda *given: Scores.apply(*given, related, columns)[: 3 if columns else 2], inputs())


@pytest.mark.parametrize("side", [2, 100])
def test_where_everything_is_related_nothing_is_left_and_nothing_is_nan(side: int) -> None:
    """Every target is the same item, so each query is related to all of them."""
    given = inputs()
    score_E, negative_B, negative_N, best_B = Scores.apply(*given, find(side, torch.ones_like(TARGET_ID)), True)
    assert all(torch.equal(each, torch.full_like(each, -math.inf)) for each in (negative_B, negative_N, best_B))
    (score_E.sum() + F.logsigmoid(-negative_B).sum() + F.logsigmoid(-negative_N).sum()).backward()
    total = given[1].detach().sum(0) / 0.1
    assert torch.allclose(given[0].grad, total.expand(7, 5), rtol=1e-13)


def test_scores_far_apart_do_not_vanish_from_columns() -> None:
    """Every row has a score 200 above those of column 0: that column's sum must not be taken relative to them."""
    query_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    target_ND = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    related = Related.find(torch.tensor([2, 2]), torch.arange(3), None, 100, torch.float32)
    _, _, negative_N, _ = Scores.apply(query_BD, target_ND, torch.tensor(0.005), related, True)
    assert negative_N[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert negative_N[1].item() == pytest.approx(200 + math.log(2), rel=1e-6)


def test_a_backward_pass_under_autocast_is_exact() -> None:
    gradients = []
    for enabled in (False, True):
        given = [each.detach().float().requires_grad_() for each in inputs()]
        related = Related.find(POSITIVE, TARGET_ID, QUERY_ID, 2, torch.float32)
        score_E, negative_B, *_ = Scores.apply(*given, related, False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (negative_B.sum() - score_E.sum()).backward()
        gradients.append([each.grad for each in given])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_second_derivative_is_refused() -> None:
    given = inputs()
    gradient, *_ = torch.autograd.grad(Scores.apply(*given, find(2), False)[1].square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Calls(TorchDispatchMode):
    """Counts the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_no_tile_waits_for_the_device() -> None:
    """None of the operations whose result the host must see, in either pass."""
    with Calls() as calls:
        related, given = find(2), inputs()
        calls.counts.clear()
        score_E, negative_B, negative_N, _ = Scores.apply(*given, related, True)
        (score_E.sum() + negative_B.sum() + negative_N.sum()).backward()
    assert calls.counts["mm"] >= 20  # five columns of four tiles
    waits = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "repeat_interleave", "bincount")
    assert {name: calls.counts[name] for name in waits if calls.counts[name]} == {}
