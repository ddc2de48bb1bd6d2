"""Faster kernels from packages that are not always there: the same functions up to rounding, and an error that says what to install.

`model.kernels: liger` fuses RMSNorm, SwiGLU or GeGLU, and rotary embeddings of the language model (Hsu et al. 2024, arXiv 2410.10989). Its
loss kernels are not used: no embedding reads the head.
"""

from __future__ import annotations

import inspect
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from vlm2vec.backbones.base import Backbone
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError

WANTED = {
    **dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu"), True),
    **dict.fromkeys(("layer_norm", "cross_entropy", "fused_linear_cross_entropy"), False),
}


def check_attention(options: ModelConfig) -> None:
    """Raise ModelError unless the attention kernel that a recipe asks for is installed."""
    if options.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ModelError("model.attention: flash_attention_2 needs a package; run pip install 'vlm2vec[flash]', or write sdpa")


def use_kernels(backbone: Backbone, options: ModelConfig) -> None:
    """Put the kernels that `model.kernels` names into the language model. Raises ModelError where they cannot be had.

    Rotary embeddings are functions of transformers' module, so other models of the same kind in this process get the fused ones too.
    """
    if options.kernels is None:
        return
    known = _liger()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError("model.kernels: liger needs a GPU; write null")
    model = language_model(backbone)
    kind = model.config.model_type
    if kind not in known:
        raise ModelError(f"model.kernels: liger has none for a {kind} language model, only for {', '.join(sorted(known))}; write null")
    shared = vars(sys.modules[type(model).__module__])
    classes = {name: value for name, value in shared.items() if isinstance(value, type)}
    accepted = inspect.signature(known[kind]).parameters
    try:
        known[kind](model=model, **{name: value for name, value in WANTED.items() if name in accepted})
    except ImportError as error:  # of names that transformers has no longer
        raise ModelError(f"model.kernels: the installed liger-kernel does not fit this transformers ({error}); write null") from error
    finally:
        shared.update(classes)  # the package replaces classes there too, of which later models would be built


def language_model(backbone: Backbone) -> Any:
    """The transformers model inside that reads words and features."""
    named = backbone.model.named_modules()
    return next(
        module for name, module in named if isinstance(module, PreTrainedModel) and backbone.parts.get(name.split(".")[-1]) == "language"
    )


def _liger() -> dict[str, Any]:
    """The package's functions by the model type that each is for."""
    try:
        return import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ModelError(f"model.kernels: liger needs a package ({error}); run pip install 'vlm2vec[kernels]', or write null") from error
