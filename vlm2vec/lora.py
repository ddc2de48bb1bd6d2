"""LoRA adapters on chosen parts of a backbone, in PEFT's own layout, loaded strictly.

Sources: LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353). PEFT does the arithmetic; this module
decides which layers it touches and refuses an adapter that does not fit tensor by tensor, because PEFT alone only warns and then serves the
base model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.layouts import renaming
from vlm2vec.backbones.weights import ADAPTER_WEIGHTS, misfit, read_adapter
from vlm2vec.config import LoraConfig
from vlm2vec.errors import AdapterError, RecipeError
from vlm2vec.io import read_json

if TYPE_CHECKING:  # slow to import, and without an adapter not needed
    from peft import PeftConfig, PeftModel

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts in front of the names of its base model


def target_patterns(backbone: Backbone, parts: tuple[str, ...], targets: tuple[str, ...] | None) -> tuple[str, str | None]:
    """Full-match patterns of module names: the linear layers of `parts`, restricted to those whose last name component is in `targets`,
    and what the first pattern matches beyond them, None if it is nothing.

    Layer numbers inside a name become `\\d+`, so the saved pattern stays short; a last component that is a number stays, because its
    neighbours in a Sequential need not be linear. Raises RecipeError if nothing matches.
    """
    every = [name for name, module in backbone.model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in every if backbone.part_of(name) in parts]
    chosen = [name for name in linear if targets is None or name.rpartition(".")[2] in targets]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "no linear layer"
        raise RecipeError(f"lora.targets: no module matches {list(targets or ())} in {list(parts)}; this backbone has: {known}")
    shapes = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in chosen}
    pattern = "|".join(sorted(shapes))
    beyond = [re.escape(name) for name in every if re.fullmatch(pattern, name) and name not in chosen]
    return pattern, "|".join(beyond) or None


def add_lora(backbone: Backbone, options: LoraConfig) -> PeftModel:
    """Inject fresh adapters into `backbone.model`, in place; the new tensors are its only trainable ones and change nothing yet."""
    import peft

    pattern, beyond = target_patterns(backbone, options.parts, options.targets)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it as a number
        lora_dropout=options.dropout,
        use_dora=options.dora,
        use_rslora=options.rslora,
        init_lora_weights="gaussian" if options.init == "gaussian" else True,
        target_modules=pattern,
        exclude_modules=beyond,
        revision=backbone.options.revision,
    )
    return _inject(backbone, config)


def _inject(backbone: Backbone, config: PeftConfig) -> PeftModel:
    from peft import get_peft_model

    # PEFT writes the model's `name_or_path` over the base named in `config`; a cache folder here means nothing elsewhere.
    backbone.model.name_or_path = backbone.options.path
    config.base_model_name_or_path = backbone.options.path
    return get_peft_model(backbone.model, config)


def _tensors(adapter: PeftModel) -> dict[str, Tensor]:
    """The adapter's own tensors by PEFT's names. Embedding layers are never part of it; PEFT would ask the Hub whether they changed."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(adapter, save_embedding_layers=False)


def save_adapter(adapter: PeftModel, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, readable by PEFT itself."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(adapter).items()}
    adapter.peft_config["default"].save_pretrained(str(directory))
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(backbone: Backbone, directory: Path) -> PeftModel:
    """Inject the adapter in `directory`, written here or by PEFT; tensors in the names of older versions of transformers are renamed.

    AdapterError names a tensor that is missing, unexpected, misshapen or not finite; ModelError a file that cannot be read.
    """
    file, published = read_adapter(directory)
    try:
        adapter = _inject(backbone, _adapter_config(directory))
    except (ValueError, TypeError) as error:
        settings, first = directory / ADAPTER_CONFIG, min(published, default="")
        raise AdapterError(f"{settings}: does not fit {backbone.options.path}, so tensor {first} has no place: {error}") from error
    expected = _tensors(adapter)
    names = _current_names(published, backbone, file)
    found, called = {names[name]: tensor for name, tensor in published.items()}, {now: name for name, now in names.items()}
    if problem := misfit(expected, found, called):
        raise AdapterError(f"{file}: {problem}")
    with torch.no_grad():
        for name, now in names.items():
            expected[now].copy_(published[name])  # a state dict shares memory with its model; PEFT's own setter drops what it cannot place
    return adapter


def _adapter_config(directory: Path) -> PeftConfig:
    """The settings of an adapter. Raises AdapterError if they are not those of a LoRA."""
    from peft import PeftConfig

    file = directory / ADAPTER_CONFIG
    settings = read_json(file)
    kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if kind != "LORA":
        raise AdapterError(f"{file}: peft_type is {kind!r}; only LORA adapters (with DoRA or rsLoRA) can be loaded")
    try:
        return PeftConfig.from_pretrained(str(directory))
    except (TypeError, ValueError, KeyError) as error:
        raise AdapterError(f"{file}: not the settings of a LoRA adapter ({error})") from error


def _current_names(published: Iterable[str], backbone: Backbone, file: Path) -> dict[str, str]:
    """For each name in an adapter file the name here. Raises AdapterError if two of them are the same tensor."""
    rename = renaming(backbone.model)
    names = {name: PREFIX + rename(name.removeprefix(PREFIX)) for name in published}
    for name, count in Counter(names.values()).items():
        if count > 1:
            raise AdapterError(f"{file}: tensor {name} is there {count} times, under an old name and a new one")
    return names


def changes_nothing(adapter: PeftModel) -> bool:
    """Whether the model with this adapter is its base model, because every second low-rank factor is zero."""
    return not any(bool(tensor.any()) for name, tensor in _tensors(adapter).items() if "lora_B" in name)
