"""From token states to one embedding per item. Shape letters: B items, L tokens, T tokens of all items of a packed row, D embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm2vec.errors import InputError, NonFiniteError


def pool(hidden_BLD: Tensor, mask_BL: Tensor, how: str) -> Tensor:
    """`embedding_BD`: the state of the last real token ("last") or the mean over the real tokens ("mean").

    It is float32, or float64 for float64 states. The mask alone says which tokens are real, so that left and right padding give the same
    result, and which item they belong to: row b of it holds the tokens of item b, that many. States (B, L, D) have a row for each item too;
    states (1, T, D) are packed, with the tokens of all items behind one another. A row without a real token becomes NaN, which `check_rows`
    refuses. Raises InputError for another `how`.
    """
    if how not in ("last", "mean"):
        raise InputError(f"model.pooling: expected last or mean, got {how!r}")
    real_BL = mask_BL.bool()
    packed = len(hidden_BLD) != len(real_BL)
    if how == "last":
        embedding_BD = hidden_BLD.flatten(0, 1)[last_places(mask_BL, packed)].to(_wide(hidden_BLD))
    else:
        embedding_BD = _mean_packed(hidden_BLD[0], real_BL.sum(dim=1)) if packed else _mean(hidden_BLD, real_BL)
    return embedding_BD if packed else embedding_BD.masked_fill(~real_BL.any(dim=1, keepdim=True), float("nan"))


def last_places(mask_BL: Tensor, packed: bool) -> Tensor:
    """Where the last real token of each item (B,) is among all tokens: of the rows behind one another, or of the packed row."""
    real_BL = mask_BL.bool()
    if packed:
        return real_BL.sum(dim=1).cumsum(0) - 1
    items, length = real_BL.shape
    last_B = torch.where(real_BL, torch.arange(length, device=real_BL.device), 0).amax(dim=1)
    return torch.arange(items, device=real_BL.device) * length + last_B


def normalize(embedding_BD: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least: bfloat16 norms are off by up to 0.3 %, which a temperature of 0.02 magnifies.

    A row that is zero, NaN or infinite, or whose squares leave the range of float32, becomes NaN. Asking here would make a GPU wait for
    the answer after every chunk: `check_rows` asks once for many.
    """
    embedding_BD = embedding_BD.to(_wide(embedding_BD))
    norm_B1 = torch.linalg.vector_norm(embedding_BD, dim=-1, keepdim=True)
    usable_B1 = torch.isfinite(norm_B1) & (norm_B1 > 0)
    return embedding_BD / norm_B1.masked_fill(~usable_B1, float("nan"))


def check_rows(unit_ND: Tensor) -> None:
    """Raise NonFiniteError if a row is no embedding, as `normalize` marks it."""
    bad_N = ~torch.isfinite(unit_ND).all(dim=-1)
    if bool(bad_N.any()):
        bad = bad_N.nonzero().squeeze(-1).tolist()
        raise NonFiniteError(f"{len(bad)} of {len(bad_N)} embeddings are zero, infinite or not a number; the first is row {bad[0]}")


def _wide(tensor: Tensor) -> torch.dtype:
    """float32, or float64 where a test computes in it."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _mean(hidden_BLD: Tensor, real_BL: Tensor) -> Tensor:
    # masked_fill rather than a product: padding may hold NaN; the sum is wide without a wide copy of the states
    total_BD = hidden_BLD.masked_fill(~real_BL.unsqueeze(-1), 0).sum(dim=1, dtype=_wide(hidden_BLD))
    return total_BD / real_BL.sum(dim=1, keepdim=True)


def _mean_packed(hidden_TD: Tensor, length_B: Tensor) -> Tensor:
    # `unsafe` leaves out a check of the lengths, for which a GPU would be waited for
    return torch.segment_reduce(hidden_TD.to(_wide(hidden_TD)), "mean", lengths=length_B, unsafe=True)
