"""What one run of the benchmark holds fixed on both sides, and the checkpoint with random weights that both sides load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from vlm2vec.backbones import family_of, shapes
from vlm2vec.backbones.loading import load_image_processor, load_tokenizer, no_bars
from vlm2vec.config import DataConfig, LoraConfig, LossConfig, ModelConfig, Recipe, RunConfig, SourceConfig, TrainConfig
from vlm2vec.encoder import Encoder
from vlm2vec.strict_yaml import parse, plain

TABLE = Path(__file__).with_name("shapes.yaml")
LORA = LoraConfig(rank=8, alpha=16.0)  # on every linear layer of the language model
TEMPERATURE = 0.02
SEED = 17
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def table() -> dict[str, dict[str, Any]]:
    """The shapes by name."""
    return plain(parse(TABLE.read_bytes(), TABLE.name))


@dataclass(frozen=True)
class Setting:
    """`folder` holds what the run writes: the checkpoint, the adapter, the pictures."""

    shape: str
    batch: int
    precision: str
    attention: str
    chunk_tokens: int
    folder: str

    @property
    def device(self) -> torch.device:
        """Chosen by what is there."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def entry(self) -> dict[str, Any]:
        """The row of the table."""
        return table()[self.shape]

    @property
    def checkpoint(self) -> Path:
        return Path(self.folder) / "checkpoint"

    @property
    def adapter(self) -> Path:
        return Path(self.folder) / "adapter"

    @property
    def pictures(self) -> Path:
        return Path(self.folder) / "pictures"

    @property
    def model(self) -> ModelConfig:
        """The model in a recipe; no text is cut. The peer knows chats only."""
        prompt = "chat" if self.entry["peer"] else "raw"
        chosen: dict[str, Any] = {"dtype": DTYPES[self.precision], "attention": self.attention, "prompt": prompt}
        return ModelConfig(path=str(self.checkpoint), max_tokens=100_000, **chosen)

    @property
    def recipe(self) -> Recipe:
        """Our side in a recipe; its data are made by `workloads` and not read through it."""
        return Recipe(
            run=RunConfig(dir=str(Path(self.folder) / "run"), seed=SEED),
            model=self.model,
            lora=LORA,
            data=DataConfig(root="made", sources=(SourceConfig(name="made"),)),
            loss=LossConfig(temperature=TEMPERATURE),
            train=TrainConfig(steps=1, global_batch=self.batch, chunk_tokens=self.chunk_tokens, keep_tokens=0, lr=1e-5),
        )


def write_models(setting: Setting) -> None:
    """Write the checkpoint, and an adapter whose second factors are not zero, so that every tensor of it has a gradient."""
    _write_checkpoint(setting)
    recipe = setting.recipe
    torch.manual_seed(SEED)
    encoder = Encoder.build(recipe.model, recipe.lora)
    stream = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in _second_factors(encoder):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=stream))
    encoder.save_pretrained(setting.adapter)


def _second_factors(encoder: Encoder) -> Iterator[torch.nn.Parameter]:
    return (parameter for name, parameter in encoder.model.named_parameters() if "lora_B" in name)


def _write_checkpoint(setting: Setting) -> None:
    """A random model at the sizes of the shape, with the tokenizer, template and token ids of the family's miniature."""
    entry = setting.entry
    sizes = shapes.known()[entry["like"]] if "like" in entry else entry
    options = replace(setting.model, prompt="raw")
    family = family_of(entry["family"], options)
    with tempfile.TemporaryDirectory() as made, no_bars():
        tiny = family.tiny_checkpoint(Path(made), model_type=entry["family"])
        config = AutoConfig.for_model(entry["family"], **sizes["config"])
        _copy_token_ids(AutoConfig.from_pretrained(str(tiny)), config)
        tokenizer = load_tokenizer(tiny, options, family.processor_class.tokenizer_class)
        kind = type(load_image_processor(tiny, options, family.processor_class.image_processor_class))
        torch.manual_seed(SEED)
        model = getattr(transformers, family.auto_class).from_config(config, dtype=getattr(torch, DTYPES[setting.precision]))
        for piece in (model, tokenizer, kind(**sizes["image_processor"])):
            piece.save_pretrained(str(setting.checkpoint))


def _copy_token_ids(source: Any, target: Any) -> None:
    for name, value in vars(source).items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(target, name, value)
    if source.get_text_config() is not source:
        _copy_token_ids(source.get_text_config(), target.get_text_config())
