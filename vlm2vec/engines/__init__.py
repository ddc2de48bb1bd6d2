"""Where weights, gradients and optimizer state live while training: copied to every rank, or spread over the ranks.

Every engine takes the same step up to rounding; the recipe (`train.engine`) or the accelerate config chooses one by memory and speed.
"""

from __future__ import annotations

from torch import nn

from vlm2vec.config import TrainConfig
from vlm2vec.encoder import Encoder
from vlm2vec.engines.base import Engine, trainable

__all__ = ["Engine", "prepare", "trainable"]


def prepare(options: TrainConfig, encoder: Encoder, loss: nn.Module) -> Engine:
    """The engine that the recipe asks for, around an encoder and loss that are whole, equal on all ranks and on their device."""
    return Engine(encoder, loss, options)
