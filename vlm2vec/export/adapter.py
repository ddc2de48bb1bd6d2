"""An adapter folder that PEFT, and through it transformers and sentence-transformers, can load."""

from __future__ import annotations

import re
from pathlib import Path

from vlm2vec.encoder import Encoder
from vlm2vec.errors import AdapterError
from vlm2vec.io import read_json, write_json
from vlm2vec.lora import ADAPTER_CONFIG

VLLM = "vLLM reads adapters of the language model only, and no DoRA: for vLLM export with --merged."


def check_adapter(encoder: Encoder) -> None:
    """Raise AdapterError for what an adapter folder cannot hold so that other tools read it."""
    if encoder.adapter is None:
        raise AdapterError(f"{encoder.source} has no adapter; export it with --merged")
    if parts := encoder.trained_parts:
        raise AdapterError(
            f"{encoder.source} trained {len(parts)} tensors in full beside its adapter, first {parts[0]}, "
            "and no other tool would read them; export it with --merged"
        )


def is_local(base: str) -> bool:
    """Whether a base is known on this machine only."""
    return Path(base).is_dir() or base.startswith("builtin/")


def open_adapter(folder: Path, base: Path, local: bool) -> None:
    """Let other tools find the base and the adapted layers.

    A local base is named by its whole path, for they know neither our built-in models nor where we were started. Names of layers may lack
    the `model.` that they have below a language head, without which an embedding is loaded.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    if local:
        settings["base_model_name_or_path"] = str(base.resolve())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), str):
            settings[key] = re.sub(r"(^|\|)model\\\.", r"\1(?:model\\.)?", settings[key])
    write_json(folder / ADAPTER_CONFIG, settings)
