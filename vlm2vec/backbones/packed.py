"""Attention in a packed chunk, whose items share one row: each item attends to itself alone, and nothing is padded.

Neither scores nor a mask over the whole row are ever made. On CUDA in half precision torch's own kernel for rows of different lengths runs
(FlashAttention-2: Dao 2023, arXiv 2307.08691). Elsewhere items of one length that lie side by side, as chunks sorted by length hold them,
go through one product or `scaled_dot_product_attention` together: they are views of the row, so that nothing is gathered or padded.

A language model gets the boundaries of the items under the names that transformers gives them, and hands them to its attention.

Shape letters: C items in a chunk, T tokens of all of them, N neighbours of L tokens each, H heads, K heads of keys and values, d width of
a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import dropout, pad, scaled_dot_product_attention
from transformers import AttentionInterface

from vlm2vec.errors import ModelError, RecipeError

PACKED = "vlm2vec_packed"  # among transformers' attention functions; none of its mask functions has this name, so that none is made
CAUSAL = ("llama", "mistral", "qwen2", "qwen3")  # language models whose tokens meet in attention alone, which gets the boundaries

# On a CPU in half precision the fused kernel takes 4 to 10 times as long as products do, forward and backward, for items so short.
HALF, SHORT = (torch.float16, torch.bfloat16), 128


def check_packs(config: Any, packs: Sequence[str]) -> None:
    """Raise RecipeError unless the language model of `config` is of a type in `packs`."""
    text = config.get_text_config().model_type
    if text not in packs:
        raise RecipeError(
            f"model.attention: packed is not for a {config.model_type} model around {text}, "
            "where items that share a row might not stay apart; use sdpa"
        )


def set_packed(model: Any) -> None:
    """Let the language model of `model` attend within items; its vision tower stays as it is."""
    text = model.config.get_text_config()
    name = next((name for name in model.config.sub_configs if getattr(model.config, name) is text), "")
    model.set_attn_implementation({name: PACKED})


def boundaries(mask_CL: Tensor) -> dict[str, Any]:
    """What the attention in a packed row must know, whose items have the tokens of `mask_CL`: transformers' FlashAttentionKwargs, of which
    `cu_seq_lens_*` (C + 1,) hold the first token of each item and T. A GPU is not waited for.
    """
    starts, longest = pad(mask_CL.sum(dim=1).cumsum(0), (1, 0)).int(), mask_CL.shape[1]
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


@dataclass(frozen=True)
class _Rule:
    """Who attends to whom within an item, and how. `window` is how many keys a query of causal attention sees at most, its own the last."""

    causal: bool
    window: int | None
    scaling: float | None
    dropout: float


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, T, H, d) of queries (1, H, T, d), keys and values (1, K, T, d), called as transformers calls its attention functions.

    Raises ModelError without boundaries, and where there is a mask, which they take the place of.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ModelError("model.attention: packed reads chunks as the model's own processor collates them; use sdpa for other inputs")
    rule = _Rule(module.is_causal, sliding_window, scaling, dropout)
    query, key, value = (tensor.to(_computed(value)) for tensor in (query, key, value))
    states = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if _kernel_takes(query, key, value, rule):
        return _by_kernel(states, cu_seq_lens_q, max_length_q, rule)[None], None
    return _by_length(states, cu_seq_lens_q.diff().tolist(), rule)[None], None


def _computed(value: Tensor) -> torch.dtype:
    """The number format of attention: autocast's where that is on, under which rotated queries and keys come wider than values."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


def _kernel() -> Callable[..., Any] | None:
    """torch's kernel for rows of different lengths, where the version has one that takes fewer heads of keys than of queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


KERNEL = _kernel()


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> bool:
    """Whether the kernel is there and knows this device, number format and width of heads, which it wants in steps of 8."""
    if KERNEL is None or not query.is_cuda or rule.dropout or query.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, rule.causal, True))


def _by_kernel(states: Sequence[Tensor], starts: Tensor, longest: int, rule: _Rule) -> Tensor:
    """(T, H, d) of states (T, H or K, d), the whole row at once."""
    assert KERNEL is not None
    before = rule.window - 1 if rule.window and rule.window < longest else -1  # -1: all
    seen = (before, 0 if rule.causal else -1)
    return KERNEL(*states, starts, starts, longest, longest, scale=rule.scaling, window_size=seen, enable_gqa=True)


def _by_length(states: Sequence[Tensor], lengths: Sequence[int], rule: _Rule) -> Tensor:
    """(T, H, d) of states (T, H or K, d), neighbours of one length at a time."""
    runs = [(len(list(items)), length) for length, items in groupby(lengths)]
    parts = zip(*(state.split([count * length for count, length in runs]) for state in states), strict=True)
    mixed = []
    for run, part in zip(runs, parts, strict=True):
        query, key, value = (state.unflatten(0, run).transpose(1, 2) for state in part)
        mixed.append(_together(query, key, value, rule).transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)


def _together(query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
    """(N, H, L, d) of N items of L tokens."""
    length = query.shape[2]
    if query.device.type == "cpu" and query.dtype in HALF and length <= SHORT:
        return _by_products(query, key, value, rule)
    band = _band(length, rule.window, query.device) if rule.window and rule.window < length else None
    shared = query.shape[1] != key.shape[1]
    causal = rule.causal and band is None
    return scaled_dot_product_attention(query, key, value, band, rule.dropout, causal, scale=rule.scaling, enable_gqa=shared)


def _by_products(query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
    """The same without a fused kernel, the queries that share a key stacked; the softmax is wide, as in transformers' eager attention."""
    length, scaling = query.shape[2], query.shape[3] ** -0.5 if rule.scaling is None else rule.scaling
    scores = ((query * scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3) @ key.mT).unflatten(2, (-1, length))
    if rule.causal:
        scores = scores.masked_fill(~_band(length, rule.window or length, query.device), -torch.inf)
    shares = dropout(scores.softmax(-1, dtype=torch.promote_types(value.dtype, torch.float32)).to(value.dtype), rule.dropout)
    return (shares.flatten(2, 3) @ value).unflatten(2, (-1, length)).flatten(1, 2)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys (L, L) each query sees: its own and those before it, `window` in all."""
    return torch.ones((length, length), dtype=torch.bool, device=device).tril().triu(1 - window)


AttentionInterface.register(PACKED, packed_attention)
