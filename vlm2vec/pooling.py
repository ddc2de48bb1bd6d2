"""From token states to one embedding per item. Shape letters: B items, L tokens, T tokens of all items of a packed row, D embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm2vec.errors import InputError, NonFiniteError


def pool(hidden_BLD: Tensor, mask_BL: Tensor, how: str) -> Tensor:
    """`embedding_BD`: the state of the last real token ("last") or the mean over the real tokens ("mean").

    It is float32, or float64 for float64 states. The mask alone says which tokens are real, so that left and right padding give the same
    result, and whose they are: it holds the number of a token's item within its row, from 1, and 0 on padding. Rows are padded and hold one
    item each, or there is one row, packed: states (1, T, D) and a mask (1, T) of 1, 1, 1, 2, 2, ... give as many embeddings as items.
    A row without a real token becomes NaN, which `normalize` refuses. Raises InputError for another `how`.
    """
    if how not in ("last", "mean"):
        raise InputError(f"model.pooling: expected last or mean, got {how!r}")
    if int(mask_BL.max()) > 1:
        return _pool_packed(hidden_BLD[0], mask_BL[0], how)
    real_BL = mask_BL.bool()
    embedding_BD = _last(hidden_BLD, real_BL) if how == "last" else _mean(hidden_BLD, real_BL)
    return embedding_BD.masked_fill(~real_BL.any(dim=1, keepdim=True), float("nan"))


def normalize(embedding_BD: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least: bfloat16 norms are off by up to 0.3 %, which a temperature of 0.02 magnifies.

    Raises NonFiniteError for a row that is zero, NaN or infinite, or whose squares leave the range of float32.
    """
    embedding_BD = embedding_BD.to(_wide(embedding_BD))
    norm_B1 = torch.linalg.vector_norm(embedding_BD, dim=-1, keepdim=True)
    usable_B = (torch.isfinite(norm_B1) & (norm_B1 > 0)).squeeze(-1)
    if not bool(usable_B.all()):
        bad = (~usable_B).nonzero().squeeze(-1).tolist()
        found = f"the first is row {bad[0]} with norm {float(norm_B1[bad[0]])}"
        raise NonFiniteError(f"{len(bad)} of {len(usable_B)} embeddings cannot be normalized; {found}")
    return embedding_BD / norm_B1


def _wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where a test computes in it."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _last(hidden_BLD: Tensor, real_BL: Tensor) -> Tensor:
    places_L = torch.arange(real_BL.shape[1], device=real_BL.device)
    last_B = torch.where(real_BL, places_L, 0).amax(dim=1)
    rows_B = torch.arange(len(last_B), device=real_BL.device)
    return hidden_BLD[rows_B, last_B].to(_wide(hidden_BLD))


def _mean(hidden_BLD: Tensor, real_BL: Tensor) -> Tensor:
    # masked_fill rather than a product: padding may hold NaN; the sum is wide without a wide copy of the states
    total_BD = hidden_BLD.masked_fill(~real_BL.unsqueeze(-1), 0).sum(dim=1, dtype=_wide(hidden_BLD))
    return total_BD / real_BL.sum(dim=1, keepdim=True)


def _pool_packed(hidden_TD: Tensor, number_T: Tensor, how: str) -> Tensor:
    length_B = torch.unique_consecutive(number_T, return_counts=True)[1]
    if how == "last":
        return hidden_TD[length_B.cumsum(0) - 1].to(_wide(hidden_TD))
    return torch.stack([item_LD.mean(0, dtype=_wide(hidden_TD)) for item_LD in hidden_TD.split(length_B.tolist())])
