"""GradCache against the gradient of the whole batch, tensor by tensor, in float64 with dropout on.

The encoder is small but whole: token embedding, a convolutional vision branch, attention with dropout, masked mean pooling. Items are text
only or have a picture, are of unequal length, and some are copies of others. Run as a script, this file is one rank of the distributed
test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vlm2vec
from vlm2vec.config import LossConfig
from vlm2vec.errors import Vlm2VecError
from vlm2vec.gradcache import StepResult, cached_backward, seeded
from vlm2vec.losses import InfoNCE
from vlm2vec.replay import Replay

WIDTH, HEADS = 16, 2
BOUND = 1e-9  # relative error of every trainable tensor; measured about 1e-15

# Item 9 is a copy of item 5 and item 10 of item 0; items 8 and 11 are nobody's positive; item 0 asks for two different targets.
QUERIES = [0, 1, 2, 3, 0, 10]
POSITIVES = [5, 6, 9, 7, 6, 5]
NEGATIVES = [8, 11]
CHUNKS = [[4, 11, 0], [5], [10, 1, 9, 2], [8, 3], [6, 7]]  # uneven; [5] has a picture, [8, 3] is text only
SEEDS = [11, 22, 33, 44, 55]
KEPT = [1, 2, len(CHUNKS)]  # chunks that are encoded once: one in any case, some, all


class Block(nn.Module):
    """Pre-norm attention and MLP with dropout; no bias on the keys, whose gradient would be zero."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, WIDTH))

    def forward(self, hidden_CLD: Tensor, mask_CL: Tensor) -> Tensor:
        heads = [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](hidden_CLD)).chunk(3, dim=-1)]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask_CL[:, None, None], dropout_p=self.dropout if self.training else 0.0)
        hidden_CLD = hidden_CLD + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden_CLD + self.mlp(self.norms[1](hidden_CLD))


class ToyEncoder(nn.Module):
    """Embeds lists of item numbers; an item is random tokens, and a picture if its number is a multiple of 5 or is 1."""

    def __init__(self, dropout: float = 0.2, checkpointing: bool = False, frozen_vision: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.tokens = nn.Embedding(30, WIDTH)
        self.vision = nn.Sequential(nn.Conv2d(3, WIDTH, 4, stride=4), nn.GELU(), nn.Dropout(dropout))
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        if frozen_vision:
            self.vision.eval().requires_grad_(False)

    @staticmethod
    def content(item: int) -> tuple[Tensor, Tensor | None]:
        item = {9: 5, 10: 0}.get(item, item)
        stream = torch.Generator().manual_seed(item)
        ids_L = torch.randint(0, 30, (3 + item % 4,), generator=stream)
        picture = torch.randn(3, 8, 8, generator=stream, dtype=torch.float64) if item % 5 == 0 or item == 1 else None
        return ids_L, picture

    def forward(self, chunk: list[int]) -> Tensor:
        device = self.tokens.weight.device
        contents = [self.content(item) for item in chunk]
        pictures = [picture for _, picture in contents if picture is not None]
        features = iter(())
        if pictures:
            stacked = torch.stack(pictures).to(device, self.tokens.weight.dtype)
            features = iter(self.projector(self.vision(stacked).flatten(2).transpose(1, 2)))
        rows = [self.tokens(ids_L.to(device)) for ids_L, _ in contents]
        rows = [row if picture is None else torch.cat([next(features), row]) for row, (_, picture) in zip(rows, contents, strict=True)]
        hidden_CLD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_CL = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool, device=device) for row in rows], batch_first=True)
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing else block
            hidden_CLD = run(hidden_CLD, mask_CL)
        return F.normalize((hidden_CLD * mask_CL[:, :, None]).sum(1), dim=1)


def build(duplicates: str = "positive", symmetric: bool = False, **options) -> tuple[ToyEncoder, InfoNCE]:
    with seeded(0):
        encoder = ToyEncoder(**options).double()
    return encoder, InfoNCE(LossConfig(temperature=0.1, learnable_temperature=True, symmetric=symmetric, duplicates=duplicates)).double()


def objective_of(loss: InfoNCE, chunks: list[list[int]]):
    """The contrastive objective on embeddings in the order of `chunks`, whatever that order is."""
    order = torch.tensor([item for chunk in chunks for item in chunk])
    targets = sorted({*POSITIVES, *NEGATIVES})
    identity = torch.tensor([{9: 5, 10: 0}.get(item, item) for item in range(len(order))])

    def objective(embedding_ID: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        item_ID = embedding_ID[torch.argsort(order).to(embedding_ID.device)]
        positive_B = torch.tensor([targets.index(item) for item in POSITIVES])
        device = embedding_ID.device
        return loss(item_ID[QUERIES], item_ID[targets], positive_B.to(device), identity[targets].to(device), identity[QUERIES].to(device))

    return objective


def whole_batch(encoder: ToyEncoder, loss: InfoNCE, chunks=CHUNKS, seeds=SEEDS, weight: float = 1.0) -> Tensor:
    """The reference: one graph over everything, no cached gradient anywhere."""
    embeddings = []
    for chunk, seed in zip(chunks, seeds, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            embeddings.append(encoder(chunk))
    value, _ = objective_of(loss, chunks)(torch.cat(embeddings))
    (value * weight).backward()
    return value.detach()


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """Gradient of every trainable tensor, each checked to be there and not zero."""
    found = {f"{index}.{name}": p.grad for index, module in enumerate(modules) for name, p in module.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        assert gradient is not None and gradient.abs().sum() > 0, f"{name} got no gradient"
    return {name: gradient.clone() for name, gradient in found.items()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over the tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def expected_gradients(*, duplicates: str = "positive", symmetric: bool = False, **options) -> tuple[dict[str, Tensor], Tensor]:
    encoder, loss = build(duplicates, symmetric, **options)
    value = whole_batch(encoder, loss)
    return gradients(encoder, loss), value


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("duplicates", ["positive", "mask"])
def test_gradient_of_every_tensor_equals_the_whole_batch(duplicates, symmetric, checkpointing, keep):
    expected, value = expected_gradients(duplicates=duplicates, symmetric=symmetric)
    encoder, loss = build(duplicates, symmetric, checkpointing=checkpointing)
    result = cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS, keep=keep)
    assert worst(gradients(encoder, loss), expected) < BOUND
    assert float(result.loss) == pytest.approx(float(value), rel=1e-13)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_tower_gives_the_same_gradient(checkpointing):
    expected, _ = expected_gradients(frozen_vision=True)
    encoder, loss = build(frozen_vision=True, checkpointing=checkpointing)
    with Replay([encoder.vision]) as replay:

        def encode(chunk: list[int]) -> Tensor:
            with replay.chunk(chunk[0]):
                return encoder(chunk)

        cached_backward(CHUNKS, encode, objective_of(loss, CHUNKS), SEEDS)
    assert worst(gradients(encoder, loss), expected) < BOUND
    assert replay.runs == [3]  # once for each chunk that has a picture


@pytest.mark.parametrize("chunks", [CHUNKS, [[item] for item in range(12)], [list(range(12))]], ids=["uneven", "singles", "one"])
def test_without_dropout_the_chunks_do_not_matter(chunks):
    """Against a single padded batch that was never cut."""
    encoder, loss = build(dropout=0.0)
    whole_batch(encoder, loss, [list(range(12))], [0])
    expected = gradients(encoder, loss)
    encoder, loss = build(dropout=0.0)
    cached_backward(chunks, encoder, objective_of(loss, chunks), range(len(chunks)))
    assert worst(gradients(encoder, loss), expected) < BOUND


@pytest.mark.parametrize("keep", KEPT)
def test_accumulation_over_two_batches(keep):
    batches = [(CHUNKS, SEEDS), (CHUNKS[::-1], [6, 7, 8, 9, 10])]
    encoder, loss = build()
    for chunks, seeds in batches:
        whole_batch(encoder, loss, chunks, seeds, weight=0.5)
    expected = gradients(encoder, loss)
    encoder, loss = build()
    results = [cached_backward(chunks, encoder, objective_of(loss, chunks), seeds, weight=0.5, keep=keep) for chunks, seeds in batches]
    assert worst(gradients(encoder, loss), expected) < BOUND
    encoder, loss = build()
    assert float(results[0].loss) == pytest.approx(float(whole_batch(encoder, loss)), rel=1e-13)  # the loss it reports is not weighted


def test_another_mask_in_the_second_pass_would_be_seen():
    """The parity tests have teeth: GradCache with fresh dropout masks in pass 2 is far off."""
    expected, _ = expected_gradients()
    encoder, loss = build()
    calls = iter(range(1000))

    def encode(chunk: list[int]) -> Tensor:
        torch.manual_seed(next(calls))
        return encoder(chunk)

    cached_backward(CHUNKS, encode, objective_of(loss, CHUNKS), SEEDS)
    assert worst(gradients(encoder, loss), expected) > 0.1


@pytest.mark.parametrize("keep", KEPT)
def test_each_chunk_is_run_without_and_then_with_a_graph_or_once_with_one(keep):
    encoder, loss = build()
    seen = []

    def encode(chunk: list[int]) -> Tensor:
        seen.append((chunk, torch.is_grad_enabled()))
        return encoder(chunk)

    cached_backward(CHUNKS, encode, objective_of(loss, CHUNKS), SEEDS, keep=keep)
    kept, cached = CHUNKS[:keep], CHUNKS[keep:]
    assert seen == [(chunk, True) for chunk in kept] + [(chunk, False) for chunk in cached] + [(chunk, True) for chunk in cached]


@pytest.mark.parametrize("keep", KEPT)
def test_a_step_is_a_pure_function_and_leaves_the_random_stream_alone(keep):
    found = []
    for outer in (1, 2):
        encoder, loss = build(checkpointing=True)
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS, keep=keep)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(gradients(encoder, loss))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    encoder, loss = build()
    cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS[::-1], keep=keep)
    assert worst(gradients(encoder, loss), found[0]) > 1e-3  # the seeds do matter


def test_seeded_restores_the_stream_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", KEPT)
def test_result_holds_what_the_caller_checks(keep):
    encoder, loss = build()
    result = cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS, keep=keep)
    assert isinstance(result, StepResult)
    with seeded(SEEDS[1]):
        assert torch.equal(result.embedding_ID[3], encoder(CHUNKS[1])[0])  # chunk order
    assert not any(tensor.requires_grad for tensor in (result.loss, result.embedding_ID, *result.stats.values()))
    assert result.stats.keys() == {"accuracy", "positive_similarity", "negative_similarity", "temperature", "duplicate_rate"}


def test_autocast_around_both_passes():
    """Weights cast to bfloat16 for the pass without a graph must not be handed to the pass with one."""
    found = []
    for keep in KEPT:
        encoder, loss = (module.float() for module in build())
        with torch.autocast("cpu", torch.bfloat16):
            cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS, keep=keep)
        found.append(gradients(encoder, loss))
    assert max(worst(each, found[-1]) for each in found) < 0.02  # sums of the same bfloat16 numbers in another order


def test_an_objective_that_ignores_the_embeddings_is_refused():
    encoder, loss = build()
    with pytest.raises(Vlm2VecError, match="does not depend on the embeddings"):
        cached_backward(CHUNKS, encoder, lambda _: (loss.temperature(), {}), SEEDS)


def test_one_seed_per_chunk():
    encoder, loss = build()
    with pytest.raises(ValueError, match="zip"):
        cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS[:-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_masks_and_streams_on_cuda():
    encoder, loss = (module.cuda() for module in build())
    before = torch.cuda.get_rng_state()
    cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS, keep=len(CHUNKS))
    expected = gradients(encoder, loss)
    encoder, loss = (module.cuda() for module in build())
    cached_backward(CHUNKS, encoder, objective_of(loss, CHUNKS), SEEDS)
    assert worst(gradients(encoder, loss), expected) < BOUND
    assert torch.equal(torch.cuda.get_rng_state(), before)


# -- two processes -----------------------------------------------------------------------------------------------------------------------

SHARES = [slice(0, 1), slice(1, 5)]  # chunks of each rank: 3 items and 9; the copies 5 and 9 are on one rank, 0 and 10 on different ones


def rank_main(rank: int, folder: Path, keep: int) -> None:
    """One rank: sum the encoder's gradients over ranks, and store them with its own gradient of the temperature."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)

    def gather(local_ID: Tensor) -> tuple[Tensor, int]:
        everyone: list = [None, None]
        dist.all_gather_object(everyone, local_ID.numpy())
        return torch.cat([torch.from_numpy(rows) for rows in everyone]), 0 if rank == 0 else len(everyone[0])

    encoder, loss = build(symmetric=True)
    chunks, seeds = CHUNKS[SHARES[rank]], SEEDS[SHARES[rank]]
    result = cached_backward(chunks, encoder, objective_of(loss, CHUNKS), seeds, gather=gather, keep=keep)
    stored = {"loss": result.loss, "1.log_temperature": loss.log_temperature.grad}
    for name, parameter in encoder.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        stored[f"0.{name}"] = gradient
    np.savez(folder / f"rank{rank}.npz", **{name: tensor.numpy() for name, tensor in stored.items()})
    dist.destroy_process_group()


@pytest.mark.parametrize("keep", [KEPT[0], *(pytest.param(keep, marks=pytest.mark.slow) for keep in KEPT[1:])])
def test_sum_over_two_ranks_is_the_gradient_of_one_process(tmp_path, keep):
    environment = {**os.environ, "PYTHONPATH": str(Path(vlm2vec.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path), str(keep)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    expected, value = expected_gradients(symmetric=True)
    for rank in range(2):
        stored = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / f"rank{rank}.npz").items()}
        assert float(stored.pop("loss")) == pytest.approx(float(value), rel=1e-13)
        assert worst(stored, expected) < 1e-12


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
