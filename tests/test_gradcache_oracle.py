"""Our two passes against an implementation by the authors of the paper: `gradcache` on PyPI."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2vec.config import LossConfig
from vlm2vec.gradcache import cached_backward
from vlm2vec.losses import InfoNCE

package = pytest.importorskip("gradcache", reason="pip install gradcache")
BOUND = 1e-12  # measured about 1e-16


@pytest.fixture
def grad_cache(monkeypatch):
    """The class; its modules import themselves under a name that the package does not have."""
    monkeypatch.setitem(sys.modules, "grad_cache", package)
    return pytest.importorskip("gradcache.grad_cache").GradCache


class Unit(nn.Module):
    """Two layers to unit rows."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 8))

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(self.layers(rows), dim=1)


def build(dropout: float) -> tuple[Unit, InfoNCE]:
    torch.manual_seed(0)
    return Unit(dropout).double(), InfoNCE(LossConfig(temperature=0.1, learnable_temperature=True, symmetric=True)).double()


def data() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, 6, generator=stream, dtype=torch.float64) for count in (7, 10))  # 7 queries, 7 positives, 3 negatives


def worst(module: nn.Module, reference: nn.Module) -> float:
    pairs = zip(module.parameters(), reference.parameters(), strict=True)
    return max(float((own.grad - other.grad).norm() / other.grad.norm()) for own, other in pairs)


def objective(loss: InfoNCE):
    return lambda embedding_ID: loss(embedding_ID[:7], embedding_ID[7:], torch.arange(7), torch.arange(10))


def two_sided(loss: InfoNCE):
    """The same objective in the form the package wants."""
    return lambda query_BD, target_ND: objective(loss)(torch.cat([query_BD, target_ND]))[0]


def split(rows: Tensor, count: int) -> list[Tensor]:
    return list(rows.split(count))


def test_equals_the_published_package(grad_cache):
    queries, targets = data()
    theirs, their_loss = build(dropout=0.0)

    value = grad_cache([theirs, theirs], 3, two_sided(their_loss), split_input_fn=split)(queries, targets)
    ours, our_loss = build(dropout=0.0)
    chunks = [*queries.split(3), *targets.split(3)]
    result = cached_backward(chunks, ours, objective(our_loss), range(len(chunks)))
    assert float(result.loss) == pytest.approx(float(value), rel=1e-14)
    assert worst(ours, theirs) < BOUND
    assert worst(our_loss, their_loss) < BOUND


def test_equals_the_published_package_with_dropout(grad_cache):
    """Both sides draw their masks from a hook that seeds each chunk by its content, so that the package replays what we replay."""
    queries, targets = data()

    def seed_by_content(module, inputs):
        torch.manual_seed(int(inputs[0].sum().abs() * 1e6))

    found = []
    for run in ("theirs", "ours"):
        encoder, loss = build(dropout=0.3)
        encoder.register_forward_pre_hook(seed_by_content)
        if run == "theirs":
            grad_cache([encoder, encoder], 4, two_sided(loss), split_input_fn=split)(queries, targets)
        else:
            chunks = [*queries.split(4), *targets.split(4)]
            cached_backward(chunks, encoder, objective(loss), range(len(chunks)))
        found.append(encoder)
    assert worst(found[1], found[0]) < BOUND
