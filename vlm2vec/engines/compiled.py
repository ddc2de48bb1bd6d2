"""`train.compile`: the layers of the language model as fused kernels (torch.compile; Ansel et al. 2024, doi 10.1145/3620665.3640366).

Each layer is compiled by itself and for any shape: layers of one kind share the result, so compiling takes no longer for eighty layers than
for one, and chunks of other sizes need no new one. Only the layers' `forward` is replaced, and only inside `compiled`: names of
parameters, checkpoints, hooks, adapters and activation checkpointing around a layer do not notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlm2vec import log
from vlm2vec.config import TrainConfig
from vlm2vec.encoder import Encoder
from vlm2vec.engines.units import find_units
from vlm2vec.errors import EnvError

BACKEND = "inductor"
# Dropout draws from torch's own stream, as without compiling. Inductor's own numbers need not be the same in GradCache's two passes, of
# which only one has a graph.
OPTIONS: dict[str, Any] = {"fallback_random": True}
# Results of one layer that torch keeps before it gives up: with and without a graph, a mask, a single row, and kinds of layers.
VARIANTS = 64
_logger = log.get_logger(__name__)


@contextmanager
def compiled(encoder: Encoder, options: TrainConfig) -> Iterator[None]:
    """Inside, the layers of the language model run compiled, where the recipe says so. Raises EnvError where torch finds no compiler."""
    if not options.compile:
        yield
        return
    check_compiler(encoder.device)
    layers: list[Any] = [part for part in find_units(encoder).parts if not isinstance(part, nn.Embedding)]
    _logger.info("%d layers will be compiled; the first steps take minutes", len(layers))
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        for layer in layers:
            layer.forward = _compile(layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def check_compiler(device: torch.device) -> None:
    """Raise EnvError unless torch can compile a line here."""
    try:
        _compile(lambda tensor: tensor.cos() + 1)(torch.ones(2, device=device))
    except Exception as error:  # as many kinds as there are compilers
        reason = str(error).strip().partition("\n")[0]
        raise EnvError(
            f"train.compile: torch cannot compile here ({type(error).__name__}: {reason}); install a C++ compiler, and for a GPU Triton, "
            "or write false"
        ) from error


def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=True, backend=BACKEND, options=OPTIONS if BACKEND == "inductor" else None)
