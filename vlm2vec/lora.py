"""LoRA adapters on chosen parts of a backbone, in PEFT's own layout, loaded strictly.

Sources: LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353). PEFT does the arithmetic; this module
decides which layers it touches and refuses an adapter that does not fit tensor by tensor, because PEFT alone only warns and then serves the
base model.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm2vec.backbones.base import Backbone
from vlm2vec.config import LoraConfig
from vlm2vec.errors import AdapterError, RecipeError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
    pattern, beyond = target_patterns(backbone, options.parts, options.targets)
    config = PeftLoraConfig(
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
    # PEFT writes the model's `name_or_path` over the base named in `config`; a cache folder here means nothing elsewhere.
    backbone.model.name_or_path = backbone.options.path
    config.base_model_name_or_path = backbone.options.path
    return get_peft_model(backbone.model, config)


def _tensors(adapter: PeftModel) -> dict[str, Tensor]:
    """The adapter's own tensors by PEFT's names. Embedding layers are never part of it; PEFT would ask the Hub whether they changed."""
    return get_peft_model_state_dict(adapter, save_embedding_layers=False)


def save_adapter(adapter: PeftModel, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, readable by PEFT itself."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(adapter).items()}
    adapter.peft_config["default"].save_pretrained(str(directory))
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(backbone: Backbone, directory: Path) -> PeftModel:
    """Inject the adapter saved in `directory`. AdapterError names a tensor that is missing, unexpected, misshapen or not finite."""
    weights = directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{weights}: not a readable safetensors file ({error}); copy or train the adapter again") from error
    config = PeftConfig.from_pretrained(str(directory))
    try:
        adapter = _inject(backbone, config)
    except ValueError as error:
        raise AdapterError(f"{directory / ADAPTER_CONFIG}: does not fit {backbone.options.path}: {error}") from error
    check_tensors(_tensors(adapter), tensors, weights)
    set_peft_model_state_dict(adapter, tensors)
    return adapter


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], file: Path) -> None:
    """Raise AdapterError unless `found` has exactly the names and shapes of `expected` and is finite throughout."""
    for name in sorted(expected.keys() - found.keys()):
        raise AdapterError(f"{file}: tensor {name} is missing; the adapter was made for another model or its keys were renamed")
    for name in sorted(found.keys() - expected.keys()):
        raise AdapterError(f"{file}: tensor {name} is unexpected; the adapter was made for another model or its keys were renamed")
    for name, tensor in sorted(found.items()):
        if tensor.shape != expected[name].shape:
            raise AdapterError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, the model needs {tuple(expected[name].shape)}")
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise AdapterError(f"{file}: tensor {name} holds {bad} non-finite values; the file is damaged or the training diverged")
