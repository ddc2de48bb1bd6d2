"""Where weights, gradients and optimizer state live while training: copied to every rank, or spread over the ranks.

Every engine takes the same step up to rounding; the recipe (`train.engine`) or the accelerate config chooses one by memory and speed.
"""

from __future__ import annotations

from vlm2vec import dist, log
from vlm2vec.config import TrainConfig
from vlm2vec.encoder import Encoder
from vlm2vec.engines.base import Engine, trainable
from vlm2vec.losses import InfoNCE

_logger = log.get_logger(__name__)

__all__ = ["Engine", "prepare", "trainable"]


def prepare(options: TrainConfig, encoder: Encoder, loss: InfoNCE) -> Engine:
    """The engine that the recipe asks for, around an encoder and loss that are whole, equal on all ranks and on their device."""
    spreading = options.engine not in (None, "ddp")
    if dist.world_size() == 1 and spreading:
        _logger.warning("train.engine: %s has nothing to spread on one process; weights and optimizer stay whole", options.engine)
    if dist.world_size() == 1 or not spreading:
        return Engine(encoder, loss, options)
    if options.engine == "fsdp2":
        from vlm2vec.engines.fsdp import FullyShardedEngine

        return FullyShardedEngine(encoder, loss, options)
    from vlm2vec.engines.zero import ZeroEngine

    return ZeroEngine(encoder, loss, options)
