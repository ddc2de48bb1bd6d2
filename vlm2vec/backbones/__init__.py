"""Model families. `load_backbone` reads a folder's model type and hands the folder to the family that knows it.

A family is one module here; it registers itself by subclassing `Backbone` with `model_types`, so there is no list to keep.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.errors import ModelError

if TYPE_CHECKING:
    from vlm2vec.backbones.base import Backbone
    from vlm2vec.config import ModelConfig

__all__ = ["family_of", "load_backbone", "registry", "resolve"]


def registry() -> dict[str, type[Backbone]]:
    """Every family by the model types it is tested with."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    from vlm2vec.backbones.base import FAMILIES

    return dict(FAMILIES)


def resolve(options: ModelConfig) -> Path:
    """The local folder of `options.path`: an existing folder, a built-in model (made on first use) or a snapshot from the Hub."""
    from vlm2vec.backbones import loading

    return loading.resolve(options)


def load_backbone(options: ModelConfig) -> Backbone:
    """The model of a recipe with its processor, on the CPU. Raises ModelError naming the file and what is wrong with it."""
    from vlm2vec.backbones.kernels import check_attention, use_kernels
    from vlm2vec.backbones.loading import read_config, refuse_code

    check_attention(options)
    folder = resolve(options)
    stated = read_config(folder).get("model_type")
    family = registry().get(stated or options.family or "")
    if not options.trust_remote_code and not (family and family.ignores_shipped_code):
        refuse_code(folder)
    if stated and options.family and stated != options.family:
        raise ModelError(f"{folder / 'config.json'}: model_type is {stated!r} but model.family says {options.family!r}; correct that")
    model_type = stated or options.family
    if not model_type:
        raise ModelError(f"{folder / 'config.json'}: no model_type; name it in model.family ({', '.join(sorted(registry()))})")
    backbone = family_of(model_type, options).load(folder, options)
    use_kernels(backbone, options)
    return backbone


def family_of(model_type: str, options: ModelConfig) -> type[Backbone]:
    """The class for a model type: a family of ours, or inference for what transformers or trusted code knows."""
    families = registry()
    if model_type in families:
        return families[model_type]
    from vlm2vec.backbones.auto import AutoBackbone, inferable_types

    inferable = inferable_types()
    if model_type in inferable or options.trust_remote_code:
        return AutoBackbone
    near = difflib.get_close_matches(model_type, [*families, *inferable], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ModelError(
        f"{options.path}: unknown model_type {model_type!r}{hint} Supported: {', '.join(sorted(families))}, "
        f"and by inference {len(inferable)} image-text-to-text types of transformers"
    )
