"""The last layer of a language model, where only the last token of each item is read (`model.pooling: last`).

What follows attention in a layer, a norm and the MLP, takes each token by itself. In the last layer it therefore runs at the tokens that
are read and nowhere else: embeddings and gradients stay what they are, and most of a layer's operations are left out.

Shape letters: B rows of L tokens, T = B L tokens of all rows, C items, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from vlm2vec.backbones.packed import CAUSAL

READ = "read_places"  # the keyword argument (C,) that travels to the layers: which of the T tokens are read
# Language models whose layers add attention(norm(x)) to x, then mlp(norm(x)), and nothing else.
PRE_NORM = (*CAUSAL, "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "phi3_v")


def narrow_last(model: Any, handed_on: Sequence[str]) -> bool:
    """Let the last layer of the language model of `model` follow READ, if it can. `handed_on`: types of language models to which the model
    around them hands its keyword arguments on.
    """
    text = model.config.get_text_config()
    dropout: float = getattr(text, "resid_pdrop", 0.0)
    if text.model_type not in PRE_NORM or text.model_type not in handed_on or dropout:
        return False
    layer = model.get_decoder().layers[-1]
    kind: Any = type(layer)
    layer.__class__ = _narrowed(kind)
    return True


@cache
def _narrowed(kind: Any) -> Any:
    """`kind` with a `forward` that follows READ: a class, because transformers puts activation checkpointing around that of a class."""

    def forward(self: Any, hidden_states: Tensor, read_places: Tensor | None = None, **kwargs: Any) -> Tensor:
        if read_places is None:
            return kind.forward(self, hidden_states, **kwargs)
        attended_BLD, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        states_BLD = hidden_states + attended_BLD
        states_TD = states_BLD.flatten(0, 1)
        made_CD = self.mlp(self.post_attention_layernorm(states_TD.index_select(0, read_places)))
        return states_TD.index_add(0, read_places, made_CD.to(states_TD.dtype)).view_as(states_BLD)

    return type(kind.__name__, (kind,), {"forward": forward})
