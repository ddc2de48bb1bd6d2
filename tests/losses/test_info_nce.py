"""InfoNCE against its definition written out with loops, in float64."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm2vec.config import LossConfig
from vlm2vec.errors import RecipeError
from vlm2vec.losses import InfoNCE, info_nce
from vlm2vec.losses.info_nce import TEMPERATURE_RANGE

ROOT = Path(__file__).parents[2]
MODES = list(itertools.product(["positive", "mask"], [False, True]))


def build(duplicates: str = "positive", symmetric: bool = False, temperature: float = 0.1, learnable: bool = False) -> InfoNCE:
    options = LossConfig(temperature=temperature, learnable_temperature=learnable, symmetric=symmetric, duplicates=duplicates)
    return InfoNCE(options).double()


def unit_rows(count: int, seed: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


# Items 0..8: item 0 asks twice, for 5 and for 7; item 5 and item 6 are wanted twice; items 8 and 3 are explicit negatives.
ITEMS = unit_rows(9, seed=1)
QUERIES = [0, 1, 2, 0, 4]
TARGETS = [5, 6, 7, 8, 3]
POSITIVES = [5, 6, 5, 7, 6]


def present(items: Tensor, targets: list[int], queries: list[int] = QUERIES, positives: list[int] = POSITIVES) -> dict[str, Tensor]:
    """Arguments of the loss for lists of item numbers; each positive points at the last column that holds it."""
    column = {item: index for index, item in enumerate(targets)}
    return {
        "query_BD": items[queries],
        "target_ND": items[targets],
        "positive_B": torch.tensor([column[item] for item in positives]),
        "target_id_N": torch.tensor(targets),
        "query_id_B": torch.tensor(queries),
    }


def anchor_loss(score: dict[int, float], positives: set[int], mode: str) -> float:
    """L_i of the documentation: `score` by distinct counterpart."""
    terms = []
    for own in positives:
        compared = set(score) if mode == "positive" else {own} | (set(score) - positives)
        terms.append(math.log(sum(math.exp(score[other]) for other in compared)) - score[own])
    return sum(terms) / len(terms)


def by_definition(items: Tensor, mode: str, symmetric: bool, temperature: float) -> float:
    queries, targets, positives = QUERIES, TARGETS, POSITIVES

    def score(left: int, right: int) -> float:
        return float(items[left] @ items[right]) / temperature

    pairs = set(zip(queries, positives, strict=True))
    forward = [
        anchor_loss({target: score(query, target) for target in set(targets)}, {target for asked, target in pairs if asked == query}, mode)
        for query in queries
    ]
    backward = [
        anchor_loss({query: score(query, target) for query in set(queries)}, {query for query, wanted in pairs if wanted == target}, mode)
        for target in set(positives)
    ]
    both = [sum(side) / len(side) for side in (forward, backward)]
    return sum(both) / 2 if symmetric else both[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize(("mode", "symmetric"), MODES)
def test_equals_the_documented_sum(mode, symmetric, temperature):
    loss, _ = build(mode, symmetric, temperature)(**present(ITEMS, TARGETS))
    expected = by_definition(ITEMS, mode, symmetric, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("mode", "symmetric"), MODES)
def test_without_duplicates_it_is_cross_entropy(mode, symmetric):
    query_BD, target_ND = unit_rows(5, seed=2), unit_rows(8, seed=3)  # three explicit negatives
    loss, _ = build(mode, symmetric)(query_BD, target_ND, torch.arange(5), torch.arange(8))
    score_BN = query_BD @ target_ND.T / 0.1
    expected = F.cross_entropy(score_BN, torch.arange(5))
    if symmetric:
        expected = (expected + F.cross_entropy(score_BN[:, :5].T, torch.arange(5))) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize(("mode", "symmetric"), MODES)
@pytest.mark.parametrize(
    "targets",
    [[5, 6, 7, 8, 3, 5], [5, 5, 5, 6, 6, 7, 7, 8, 8, 8, 3], [3, 8, 7, 6, 5]],
    ids=["one copied", "all copied", "reversed"],
)
def test_copies_and_order_of_targets_change_nothing(mode, symmetric, targets):
    losses, gradients = [], []
    for presented in (TARGETS, targets):
        items = ITEMS.clone().requires_grad_()
        loss, stats = build(mode, symmetric)(**present(items, presented))
        loss.backward()
        losses.append(torch.stack([loss.detach(), *stats.values()]))
        gradients.append(items.grad)
    assert relative(losses[1], losses[0]) < 1e-14
    assert relative(gradients[1], gradients[0]) < 1e-14


@pytest.mark.parametrize("scores", [1, 12, 20], ids=["one by one", "three and a rest", "four and a rest"])
@pytest.mark.parametrize(("mode", "symmetric"), MODES)
def test_tiles_change_nothing(mode, symmetric, scores, monkeypatch):
    """Values, statistics and gradients, of the temperature too, with copies that fall into different tiles."""
    targets = [5, 6, 7, 8, 3, 5]
    found = []
    for size in (info_nce.SCORES, scores):
        monkeypatch.setattr(info_nce, "SCORES", size)
        items = ITEMS.clone().requires_grad_()
        loss = InfoNCE(LossConfig(temperature=0.1, learnable_temperature=True, symmetric=symmetric, duplicates=mode)).double()
        value, stats = loss(**present(items, targets))
        value.backward()
        found.append((torch.stack([value.detach(), *stats.values()]), items.grad, loss.log_temperature.grad))
    for whole, tiled in zip(*found, strict=True):
        assert relative(tiled, whole) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_as_exact_as_cross_entropy_of_the_whole_matrix(symmetric, dtype, monkeypatch):
    """Against float64, with five by six tiles. Float32 rounds scores of 1/0.05, so that the plain loss has errors of this size as well."""
    monkeypatch.setattr(info_nce, "SCORES", 64**2)
    given = unit_rows(300, seed=6, width=32), unit_rows(350, seed=7, width=32)
    found = []
    for kind, plain in ((dtype, False), (torch.float64, True)):
        query_BD, target_ND = (each.to(kind, copy=True).requires_grad_() for each in given)
        if plain:
            score_BN = query_BD @ target_ND.T / 0.05
            loss = F.cross_entropy(score_BN, torch.arange(300))
            loss = (loss + F.cross_entropy(score_BN[:, :300].T, torch.arange(300))) / 2 if symmetric else loss
        else:
            loss, _ = build(symmetric=symmetric, temperature=0.05)(query_BD, target_ND, torch.arange(300), torch.arange(350))
        loss.backward()
        found.append((loss.detach(), query_BD.grad, target_ND.grad))
    for ours, exact in zip(*found, strict=True):
        assert relative(ours, exact) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_a_tiny_loss_keeps_its_digits():
    """Softmax alone with weights: each query is on its target and 50 above all others, where float32 sees log(1 + 3e-22) as 0."""
    same = torch.eye(3)
    loss, _ = InfoNCE(LossConfig(temperature=0.02))(same, same, torch.arange(3), torch.arange(3))
    assert float(loss) == pytest.approx(2 * math.exp(-50), rel=1e-5, abs=0)


def test_no_more_scores_are_held_than_a_tile_has(monkeypatch):
    """Everything that the forward pass saves for the backward pass: embeddings, and nothing of the size of all scores."""
    monkeypatch.setattr(info_nce, "SCORES", 4 * 64)
    query_BD, target_ND = (unit_rows(64, seed=seed).requires_grad_() for seed in (1, 2))
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build("mask", True)(query_BD, target_ND, torch.arange(64), torch.arange(64))
    assert 0 < max(sizes) <= query_BD.numel()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_matrix():
    """16,384 by 16,384 scores are 1 GiB; beyond inputs and gradients a fresh process holds a few tiles of 16 MiB."""
    size = json.dumps({"queries": 16384, "targets": 16384, "width": 256})
    command = [sys.executable, "-m", "benchmarks.throughput.loss", "--child", size]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["memory"] < 256 * 2**20


def test_equal_copies_get_equal_parts_of_the_gradient():
    arguments = present(ITEMS, [5, 6, 7, 8, 3, 5])
    arguments["target_ND"] = arguments["target_ND"].clone().requires_grad_()
    build()(**arguments)[0].backward()
    assert relative(arguments["target_ND"].grad[0], arguments["target_ND"].grad[5]) < 1e-15


@pytest.mark.parametrize("symmetric", [False, True])
def test_positive_and_mask_differ_only_where_a_query_has_several_positives(symmetric):
    plain = dict(queries=[0, 1, 2], positives=[5, 6, 5])
    one, other = (build(mode)(**present(ITEMS, TARGETS, **plain))[0] for mode in ("positive", "mask"))
    assert one.item() == pytest.approx(other.item(), rel=1e-14)
    one, other = (build(mode, symmetric)(**present(ITEMS, TARGETS))[0] for mode in ("positive", "mask"))
    assert abs(float(one) - float(other)) > 1e-3


def test_mask_never_compares_related_targets():
    """With nothing else in the batch, a query with two positives has nothing to learn from: loss and gradient are exactly zero, not NaN."""
    items = ITEMS.clone().requires_grad_()
    loss, stats = build("mask")(**present(items, [5, 7], queries=[0, 0], positives=[5, 7]))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(items.grad, torch.zeros_like(items))
    assert all(torch.isfinite(value) for value in stats.values())


def test_positive_wants_related_targets_equally_near():
    query_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    angle = math.pi / 4
    target_ND = torch.tensor([[math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)]], dtype=torch.float64)
    loss, _ = build("positive")(query_BD, target_ND, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([9, 9]))
    assert float(loss) == pytest.approx(math.log(2), rel=1e-14)  # the entropy of its label, hence the minimum


@pytest.mark.parametrize(("mode", "symmetric"), MODES)
def test_gradient_by_finite_differences(mode, symmetric):
    loss = build(mode, symmetric, learnable=True)
    fixed = {name: value for name, value in present(ITEMS, [5, 6, 7, 8, 3, 5, 6]).items() if name not in ("query_BD", "target_ND")}

    def value(items, target_ND, log_temperature):
        arguments = {"query_BD": items[QUERIES], "target_ND": target_ND, **fixed}
        return torch.func.functional_call(loss, {"log_temperature": log_temperature}, kwargs=arguments)[0]

    copies = unit_rows(7, seed=4)  # copies that differ, as under dropout
    inputs = (ITEMS.clone(), copies, torch.tensor(math.log(0.1), dtype=torch.float64))
    assert torch.autograd.gradcheck(value, [tensor.requires_grad_() for tensor in inputs])


def test_statistics():
    query_BD = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [1.0, 0]], requires_grad=True)
    target_ND = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    target_id_N = torch.tensor([7, 8, 7, 9])  # columns 0 and 2 are one item, column 3 is an explicit negative
    _, stats = build(temperature=0.05)(query_BD, target_ND, torch.tensor([0, 1, 2, 0]), target_id_N, torch.tensor([1, 2, 3, 1]))
    assert float(stats["accuracy"]) == 0.25  # only the second query prefers its own; the others prefer the explicit negative
    assert float(stats["positive_similarity"]) == pytest.approx((0.6 + 1.0 + 0.6 + 0.6) / 4)
    # distinct queries a (rows 0 and 3), b, c; distinct targets 7, 8, 9: unrelated are a-8, a-9, b-7, b-9, c-8, c-9
    assert float(stats["negative_similarity"]) == pytest.approx((0.0 + 1.0 + 0.8 + 0.0 + 0.0 + 1.0) / 6)
    assert float(stats["temperature"]) == pytest.approx(0.05)
    assert float(stats["duplicate_rate"]) == pytest.approx(6 / 12)  # rows 0, 2 and 3 share a target: 6 of 12 ordered pairs
    assert not any(value.requires_grad for value in stats.values())


def test_a_tie_is_no_hit():
    same_BD = torch.ones(3, 4) / 2
    _, stats = build()(same_BD, same_BD, torch.arange(3), torch.arange(3))
    assert float(stats["accuracy"]) == 0


def test_a_single_pair_is_finite():
    loss, stats = build(symmetric=True)(ITEMS[:1], ITEMS[:1], torch.tensor([0]), torch.tensor([0]))
    assert loss.item() == 0
    assert float(stats["accuracy"]) == 1
    assert float(stats["negative_similarity"]) == float(stats["duplicate_rate"]) == 0


def test_logits_are_float32_whatever_comes_in():
    """bfloat16 rows under autocast give the loss of the same rows in float64: no bfloat16 product, which is off by 0.1 here."""
    items = ITEMS.bfloat16()
    loss = InfoNCE(LossConfig(temperature=0.02))
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = loss(**present(items, TARGETS))
    high, _ = loss(**present(items.double(), TARGETS))
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    assert float(low) == pytest.approx(float(high), rel=1e-5)


def test_learnable_temperature_learns_and_stays_in_its_range():
    loss = build(learnable=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    loss(**present(ITEMS, TARGETS))[0].backward()
    assert float(loss.log_temperature.grad.abs()) > 0
    for outside, bound in ((-20.0, TEMPERATURE_RANGE[0]), (20.0, TEMPERATURE_RANGE[1])):
        loss.log_temperature.data.fill_(outside)
        optimizer.zero_grad()
        value, stats = loss(**present(ITEMS, TARGETS))
        value.backward()
        assert float(stats["temperature"]) == pytest.approx(bound, rel=1e-12)
        assert loss.log_temperature.item() == pytest.approx(math.log(bound), rel=1e-12)  # brought back, so that it can move again
        assert torch.isfinite(loss.log_temperature.grad)


def test_a_fixed_temperature_is_no_parameter():
    assert list(build().parameters()) == []


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_unusable_temperature_is_refused(temperature):
    with pytest.raises(RecipeError, match="loss.temperature must be > 0 and finite"):
        build(temperature=temperature)


def test_learnable_temperature_must_start_in_its_range():
    with pytest.raises(RecipeError, match="loss.temperature must start in"):
        build(temperature=0.001, learnable=True)
