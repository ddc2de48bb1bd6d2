"""From what a recipe calls a model to a local folder, and from a folder to strictly loaded parts.

Nothing is repaired quietly: code that ships with a model, a tensor that is missing or unexpected, a file that is not what its name
says are errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from vlm2vec.backbones.packed import set_packed
from vlm2vec.backbones.weights import ADAPTER_PICKLE, check_text, check_weights, tensor_names
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError
from vlm2vec.io import read_json

BUILTIN_PREFIX = "builtin/"
CONFIG = "config.json"
JSON_FILES = (CONFIG, "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")
WANTED = ("*.safetensors", ADAPTER_PICKLE, "recipe.yaml", *(f"*{suffix}" for suffix in TEXT_SUFFIXES))
LOADING_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def resolve(options: ModelConfig) -> Path:
    """The local folder of `options.path`: an existing folder, a built-in model (made on first use) or a snapshot from the Hub."""
    if options.path.startswith(BUILTIN_PREFIX):
        from vlm2vec.backbones.builtin import builtin_checkpoint  # it imports the families, which import this module

        return builtin_checkpoint(options.path.removeprefix(BUILTIN_PREFIX))
    folder = Path(options.path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or options.path.startswith((".", "~")) or options.path.count("/") > 1:
        raise ModelError(f"{options.path}: no such folder; model.path is a folder, a Hub id such as owner/name, or builtin/<name>")
    return _snapshot(options)


def _snapshot(options: ModelConfig) -> Path:
    name = f"{options.path}@{options.revision or 'main'}"
    try:
        endpoint = os.environ.get("HF_ENDPOINT")
        return Path(snapshot_download(options.path, revision=options.revision, allow_patterns=list(WANTED), endpoint=endpoint))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"model {name} not in cache and offline; connect once, or give a local folder as model.path") from error
    except GatedRepoError as error:
        raise ModelError(f"model {name} is gated: accept its terms on the Hub and set HF_TOKEN ({_words(error)})") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"model {name} cannot be had; check its name, model.revision and HF_TOKEN ({_words(error)})") from error


def _words(error: Exception) -> str:
    """The server's message without the line breaks and the trailing help text."""
    return " ".join((getattr(error, "server_message", None) or str(error)).split())[:300]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`, once its text files are known to be what their names say."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: no {CONFIG}; {_what_it_is(folder)}")
    for file in sorted(folder.iterdir()):
        if file.suffix in TEXT_SUFFIXES:
            check_text(file)
    return _json_object(folder / CONFIG)


def _what_it_is(folder: Path) -> str:
    """A folder that is no model, in words."""
    if (folder / "adapter_config.json").is_file():
        return "it is a LoRA adapter, give its base model as path"
    if any((folder / "model" / name).is_file() for name in (CONFIG, "adapter_config.json")):
        return f"the model is in {folder / 'model'}"
    return "it is no model folder"


def _json_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def refuse_code(folder: Path) -> None:
    """Raise ModelError if a file of `folder` asks for code that ships with it."""
    for file in (folder / name for name in JSON_FILES if (folder / name).is_file()):
        modules = sorted({f"{name.rpartition('.')[0].rpartition('--')[2]}.py" for name in _code_names(_json_object(file))})
        if modules:
            raise ModelError(
                f"{file}: repo ships code ({', '.join(modules)}); refused. "
                "If you have read it, set model.trust_remote_code: true and model.revision to the commit you read"
            )


def _code_names(settings: Any, mapped: bool = False) -> Iterator[str]:
    """Classes named by any `auto_map`, however deep: "module.Class", "owner/repo--module.Class" or lists of these."""
    if isinstance(settings, str) and mapped:
        yield settings
    elif isinstance(settings, list) and mapped:
        for entry in settings:
            yield from _code_names(entry, mapped)
    elif isinstance(settings, dict):
        for key, value in settings.items():
            yield from _code_names(value, mapped or key == "auto_map")


def load_model(auto_class: str, folder: Path, options: ModelConfig, aliases: Mapping[str, str] | None = None) -> Any:
    """The transformers model in `folder`, every tensor accounted for. Raises ModelError otherwise.

    `aliases` maps names under which a tensor may be stored instead of its own; they are read where the own one is absent. Embeddings do not
    read the head over the vocabulary, and sentence-transformers saves models without it: where it is absent it is zero.
    """
    check_weights(folder)
    stored = tensor_names(folder) if aliases else set()
    used = {alias: name for alias, name in (aliases or {}).items() if alias in stored and name not in stored}
    model, report = _load(
        getattr(transformers, auto_class).from_pretrained,
        folder,
        options,
        dtype=getattr(torch, options.dtype),
        attn_implementation="sdpa" if options.attention == "packed" else options.attention,
        use_safetensors=True,
        key_mapping=used or None,
        ignore_mismatched_sizes=True,  # reported below, where both shapes can be named
        output_loading_info=True,
    )
    report["missing_keys"] = set(report["missing_keys"]) - _zero_head(model, report["missing_keys"])
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(map(_tensor, report[f"{kind}_keys"]))
        if names:
            raise ModelError(
                f"{folder}: {len(names)} {kind} tensor{'s' * (len(names) > 1)}, first {names[0]}; "
                f"the weights do not belong to a {type(model).__name__} of this configuration"
            )
    if options.attention == "packed":
        set_packed(model)
    return model


def _zero_head(model: Any, missing: Collection[str]) -> set[str]:
    """The names of those missing tensors that the head over the vocabulary has for itself, which are zero from here on."""
    head = model.get_output_embeddings() if missing else None
    if head is None:
        return set()
    own = {id(parameter) for parameter in head.parameters()} - {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    found = {name: parameter for name, parameter in model.named_parameters() if name in missing and id(parameter) in own}
    for parameter in found.values():
        torch.nn.init.zeros_(parameter)
    return set(found)


def _tensor(entry: str | tuple[str, Any, Any]) -> str:
    """A tensor in words: its name, and both shapes where they differ."""
    return entry if isinstance(entry, str) else f"{entry[0]} with shape {tuple(entry[1])}, the model needs {tuple(entry[2])}"


def load_tokenizer(folder: Path, options: ModelConfig, reader: Any) -> Any:
    """The tokenizer in `folder`, read by the class `reader`."""
    return _load(reader.from_pretrained, folder, options)


def load_image_processor(folder: Path, options: ModelConfig, reader: Any) -> Any:
    """The image processor in `folder`, always the PIL one, so that pixels do not depend on whether torchvision is there."""
    return _load(reader.from_pretrained, folder, options, backend="pil")


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for each file; its setting is put back afterwards."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _load(loader: Callable[..., Any], folder: Path, options: ModelConfig, **kwargs: Any) -> Any:
    try:
        with no_bars():
            return loader(str(folder), trust_remote_code=options.trust_remote_code, local_files_only=True, **kwargs)
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
