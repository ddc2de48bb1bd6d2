"""Memory of a step: with the same chunk budget the global batch costs its items and embeddings, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import resource, sys, torch
from pathlib import Path
from tests.runs import tiny_recipe
from vlm2vec.batch import Batch
from vlm2vec.collate import Features
from vlm2vec.losses import InfoNCE
from vlm2vec.engines import prepare
from vlm2vec.step import Step
from vlm2vec.trainer import load_encoder
from dataclasses import replace

pairs = int(sys.argv[1])
torch.set_num_threads(1)
recipe = tiny_recipe(Path("unused"), lora="{rank: 4}")
recipe = replace(recipe, train=replace(recipe.train, global_batch=pairs, chunk_tokens=16384))
encoder, loss = load_encoder(recipe, None), InfoNCE(recipe.loss)
step = Step(recipe, prepare(recipe.train, encoder, loss))

def batch(count):
    rows = torch.arange(2 * count)
    features = [Features(torch.randint(1, 200, (32,), generator=torch.Generator().manual_seed(int(row)))) for row in rows]
    return Batch(features, rows, rows[:count], rows[count:], rows[:0], [str(row) for row in rows[:count]])

small, whole = batch(256), batch(pairs)
step(0, [small], 1e-3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1, [whole], 1e-3)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(before, after)
"""


WIDTH = 32  # of an embedding of the tiny model


def peaks(pairs: int) -> tuple[int, int]:
    """Peak resident kB after a step of 256 pairs, and after a second step of `pairs`.

    The allocator gives freed blocks back at once: the question is what a step holds, not what a heap keeps for later.
    """
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROBE, str(pairs)], capture_output=True, text=True, cwd=root, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = done.stdout.split()[-2:]
    return int(before), int(after)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_global_batch() -> None:
    """16,384 pairs against 256 in chunks of 16,384 tokens, besides embeddings with their gradient; the items lie in memory before both."""
    small, whole = peaks(16384)
    embeddings = 2 * 4 * WIDTH * 2 * (16384 - 256) // 1024
    assert whole - embeddings - small <= 0.05 * small, (small, whole, embeddings)
