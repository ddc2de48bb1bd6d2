"""A model without its weights: the modules of a configuration on the device "meta", where nothing takes memory, and its processor.

Configurations come from a local folder, from the Hub's cache, or from the table in `sizes.yaml`, which knows the models that recipes name.
A model of the table has the picture arithmetic of its own settings but a miniature's tokenizer: only image tokens may be counted with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from vlm2vec.backbones import family_of
from vlm2vec.backbones.auto import InferredProcessor
from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.loading import CONFIG, load_image_processor, load_tokenizer, no_bars, read_config, resolve
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError
from vlm2vec.strict_yaml import parse, plain

TABLE = Path(__file__).with_name("sizes.yaml")


@dataclass(frozen=True)
class Shape:
    """`backbone` lies on "meta"; `source` says where its sizes come from; `tokenizes` whether its tokenizer is the model's own."""

    backbone: Backbone
    source: str
    tokenizes: bool


@cache
def known() -> dict[str, dict[str, Any]]:
    """The table by model id."""
    return plain(parse(TABLE.read_bytes(), TABLE.name))


def shape_of(options: ModelConfig) -> Shape:
    """The modules and the processor of a recipe's model. Nothing is downloaded. Raises ModelError for a model that is nowhere known."""
    entry = known().get(options.path)
    if entry is not None and not Path(options.path).is_dir():
        return _from_table(options, entry)
    folder = _local(options)
    family = family_of(str(read_config(folder).get("model_type") or options.family or ""), options)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    processor = family.processor_class.load(folder, options, config)
    if isinstance(processor, InferredProcessor):
        processor.tokens_per_image = _stated_tokens(config, folder)
    return Shape(_on_meta(family, config, processor, options), str(folder / CONFIG), True)


def _stated_tokens(config: Any, folder: Path) -> int:
    """Tokens of a picture where a family was inferred; loading finds them with a trial, for which there are no weights here."""
    tokens = int(getattr(config, "image_seq_length", 0) or 0)
    if not tokens:
        raise ModelError(f"{folder / CONFIG}: does not say how many tokens a picture has (image_seq_length), and no family here knows it")
    return tokens


def _from_table(options: ModelConfig, entry: dict[str, Any]) -> Shape:
    family = family_of(entry["family"], options)
    config = AutoConfig.for_model(entry["family"], **entry["config"])
    with no_bars():
        folder = resolve(ModelConfig(path=f"builtin/tiny-{entry['family']}"))
    tiny = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    tokenizer = load_tokenizer(folder, options, family.processor_class.tokenizer_class)
    images = type(load_image_processor(folder, options, family.processor_class.image_processor_class))(**entry["image_processor"])
    if config.image_token_id != tiny.image_token_id:
        config.image_token_id = tiny.image_token_id
    processor = family.processor_class(tokenizer, images, options, config)
    return Shape(_on_meta(family, config, processor, options), f"table of known models ({entry['source']})", False)


def _on_meta(family: type[Backbone], config: Any, processor: Any, options: ModelConfig) -> Backbone:
    with torch.device("meta"):
        model = getattr(transformers, family.auto_class).from_config(config)
    return family(model, processor, options)


def _local(options: ModelConfig) -> Path:
    """The folder of the model, if it is on this machine. A built-in miniature is made."""
    if options.path.startswith("builtin/") or options.path.count("/") != 1 or Path(options.path).is_dir():
        return resolve(options)
    try:
        return Path(snapshot_download(options.path, revision=options.revision, allow_patterns=["*.json"], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model {options.path} is neither in the cache nor in the table of known models ({', '.join(known())}); "
            "fetch its *.json files once, or give a local folder as model.path"
        ) from error
