"""An embedding with transformers alone: the lines that the card of an export shows, and that the parity gate runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_states(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The last hidden states (N, L, D) of a batch and its mask (N, L)."""
    with torch.no_grad():
        return model(**batch.to(model.device)).last_hidden_state.float(), batch["attention_mask"]


def pool_last(states: Tensor, mask: Tensor) -> Tensor:
    """Unit embeddings (N, D): the state of the last token, whichever side is padded."""
    last = mask.cumsum(dim=1).argmax(dim=1)
    return torch.nn.functional.normalize(states[torch.arange(len(last)), last], dim=-1)


def pool_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Unit embeddings (N, D): the mean over all tokens."""
    return torch.nn.functional.normalize((states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)


POOLS = {"last": pool_last, "mean": pool_mean}
