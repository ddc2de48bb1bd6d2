"""An adapter folded into its base, and the number format of what is written.

Sums are made in float32 and rounded once, at the end: a low-rank update is often smaller than a step of bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlm2vec.encoder import Encoder
from vlm2vec.errors import NonFiniteError


def merge(encoder: Encoder) -> None:
    """Fold the adapter of an encoder in float32 into its weights, in place; the parts trained in full are among these already."""
    if encoder.adapter is None:
        return
    encoder.model.float()
    encoder.adapter.merge_and_unload()
    encoder.adapter, encoder.trained_parts = None, ()


def cast(encoder: Encoder, dtype: str) -> None:
    """Bring the weights into a number format. Raises NonFiniteError where one of them is not a number there, or was none before."""
    encoder.model.to(getattr(torch, dtype))
    check_finite(encoder.model.state_dict(), dtype)


def check_finite(tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Raise NonFiniteError naming the first tensor that holds NaN or infinity."""
    for name, tensor in sorted(tensors.items()):
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"{name} holds {bad} non-finite values as {dtype}; nothing was exported; train again or change --dtype")
