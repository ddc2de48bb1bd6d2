"""Small runs that tests share: a tiny recipe, a forked run of it, and what it leaves behind."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from vlm2vec.config import Recipe, parse_recipe
from vlm2vec.errors import Vlm2VecError
from vlm2vec.trainer import LOG, prepare_run_dir, train

TEMPLATE = """
run: {{dir: {dir}, seed: 5}}
model: {{path: builtin/tiny-{family}, family: {family}, train: {parts}, pooling: last, max_tokens: 64}}
lora: {lora}
data:
  root: builtin/tiny
  block: 4
  sources: [{{name: image_to_text}}, {{name: text_to_image}}, {{name: composed}}]  # the third kind carries negatives
loss: {{temperature: 0.05, symmetric: true, learnable_temperature: true}}
train: {{steps: {steps}, global_batch: 12, chunk_tokens: 160, keep_tokens: 0, lr: 1e-3, warmup: 2}}
checkpoint: {{every: 3, keep: 2}}
evaluate: {{after: false}}
"""
LORA = "{rank: 4, alpha: 8, dropout: 0.1, dora: true}"


def tiny_recipe(run_dir: Path, family: str = "qwen2_vl", lora: str = LORA, parts: str = "[]", steps: int = 12) -> Recipe:
    """A recipe of seconds with dropout on, explicit negatives, blocks, a learnable temperature and two checkpoints to keep."""
    return parse_recipe(TEMPLATE.format(dir=run_dir, family=family, lora=lora, parts=parts, steps=steps))


def start_run(recipe: Recipe, **options: Any) -> Any:
    """Train `recipe` in this process."""
    prepare_run_dir(recipe)
    return train(recipe, **options)


def fork_run(recipe: Recipe) -> int:
    """Train `recipe` in a forked child and return its process id; its exit code is that of the command line."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    try:
        start_run(recipe)
    except Vlm2VecError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def final_bytes(run_dir: Path) -> dict[str, bytes]:
    """The log and every tensor file of the newest checkpoint."""
    newest = max(run_dir.glob("step-*"))
    files = [run_dir / LOG, *newest.glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}
