"""Tokenizer and processor files of an export: the base's own bytes wherever they still say what is in use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vlm2vec.backbones.base import Processor
from vlm2vec.backbones.loading import load_image_processor
from vlm2vec.io import read_json

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model"),
)
IMAGES, NESTED = "preprocessor_config.json", "processor_config.json"
OTHERS = ("video_preprocessor_config.json", "generation_config.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def copy_processor_files(processor: Processor, source: Path, folder: Path) -> None:
    """Put the files of `source` over those that saving made, and into them what the settings of the encoder changed about pictures."""
    for name in (*TOKENIZER, IMAGES, NESTED, *OTHERS, *TEMPLATES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    changed = _changed(processor, source)
    for name in (IMAGES, NESTED):
        if changed and (folder / name).is_file():
            _change(folder / name, changed)


def _changed(processor: Processor, source: Path) -> dict[str, Any]:
    """Settings of the image processor in use that the files of `source` do not say."""
    stated = load_image_processor(source, processor.options, processor.image_processor_class).to_dict()
    used = json.loads(processor.image_processor.to_json_string())
    return {key: value for key, value in used.items() if json.loads(json.dumps(stated.get(key), default=dict)) != value}


def _change(file: Path, changed: dict[str, Any]) -> None:
    """Write settings where the file has those of the image processor."""
    settings = read_json(file)
    part = settings.get("image_processor") if file.name == NESTED else settings
    if part is not None:
        part.update(changed)
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
