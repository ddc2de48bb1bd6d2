"""The peer's side: sentence-transformers' own modules and its cached loss, set up as its documentation recommends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available

from benchmarks.throughput.measure import Label, language_pass, spent
from benchmarks.throughput.setting import DTYPES, TEMPERATURE, Setting
from vlm2vec.backbones import family_of
from vlm2vec.backbones.loading import load_image_processor, no_bars
from vlm2vec.data.types import Item, Pair

PREFIX = "base_model.model.model."  # in front of the names in our adapter file
Features = list[dict[str, Any]]  # of the queries, of the targets


@dataclass(frozen=True)
class MiniBatch:
    """How the peer cuts a column: so many rows, or so many tokens without padding."""

    rows: int | None = None
    tokens: int | None = None

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Row numbers of each mini-batch, in the order of the column, as the peer's loss forms them."""
        if self.rows is not None:
            return [list(range(start, min(start + self.rows, len(lengths)))) for start in range(0, len(lengths), self.rows)]
        found: list[list[int]] = []
        for row, length in enumerate(lengths):
            if found and sum(lengths[other] for other in found[-1]) + length <= (self.tokens or 0):
                found[-1].append(row)
            else:
                found.append([row])
        return found

    def padded(self, lengths: Sequence[int]) -> list[int]:
        """Padded tokens of each mini-batch; the loss drops columns that are all padding."""
        return [len(rows) * max(lengths[row] for row in rows) for rows in self.cut(lengths)]


def largest(kind: Callable[[int], MiniBatch], columns: Sequence[Sequence[int]], budget: int, most: int) -> MiniBatch:
    """The largest mini-batch of a kind, none of which exceeds `budget` padded tokens on these columns; at least the smallest."""
    fitting = [size for size in range(1, most + 1) if max(max(kind(size).padded(lengths)) for lengths in columns) <= budget]
    return kind(max(fitting, default=1))


class Peer:
    """The same checkpoint and adapter behind `encode` and `CachedMultipleNegativesRankingLoss`."""

    def __init__(self, setting: Setting, mini_batch: MiniBatch | None = None) -> None:
        _allow_no_video()
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        self.setting = setting
        with no_bars():
            transformer = Transformer(
                str(setting.checkpoint),
                model_kwargs={"dtype": DTYPES[setting.precision], "attn_implementation": setting.attention},
                processing_kwargs={"chat_template": {"add_generation_prompt": True}},
            )
        self.inner: Any = transformer.model
        self.processor = transformer.processor
        self.family = family_of(setting.entry["family"], setting.model)
        kind = self.family.processor_class.image_processor_class
        self.processor.image_processor = load_image_processor(setting.checkpoint, setting.model, kind)  # the same code cuts pictures
        self.width = transformer.get_embedding_dimension()
        pooling = Pooling(self.width, pooling_mode="lasttoken")
        self.model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(setting.device))
        self._adapt()
        self.loss = CachedMultipleNegativesRankingLoss(self.model, scale=1 / TEMPERATURE)
        self.optimizer = torch.optim.AdamW(self._trained().values(), lr=0.0, weight_decay=0.0)
        self.use(mini_batch or MiniBatch(rows=32))
        self.rows_of_encode = 32

    def _adapt(self) -> None:
        """Put our adapter on the same layers, tensor by tensor."""
        file = load_file(self.setting.adapter / "adapter_model.safetensors")
        saved = {name.removeprefix(PREFIX): tensor for name, tensor in file.items()}
        config = json.loads((self.setting.adapter / "adapter_config.json").read_text("utf-8"))
        layers = sorted({name.split(".lora_")[0] for name in saved})
        options = PeftLoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], lora_dropout=0.0, target_modules=layers)
        inject_adapter_in_model(options, self.inner)  # what the peer's `add_adapter` calls once it has looked at versions
        trained = self._trained()
        assert trained.keys() == {_named(name) for name in saved}, "the adapters differ"
        with torch.no_grad():
            for name, tensor in saved.items():
                trained[_named(name)].data = tensor.to(self.setting.device)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.inner.named_parameters() if parameter.requires_grad}

    # -- training --------------------------------------------------------------------------------------------------------------------------

    def use(self, mini_batch: MiniBatch) -> None:
        """Cut columns so from now on; the scores are computed in tiles of the same number of rows as before."""
        self.mini_batch = mini_batch
        self.loss.mini_batch_size = mini_batch.rows or self.setting.batch
        self.loss.mini_batch_num_tokens = mini_batch.tokens

    def tune(self, features: Features) -> MiniBatch:
        """Take the faster of the two ways to cut columns, each at the largest size whose chunks hold no more padded tokens than ours."""
        columns = [column["attention_mask"].sum(1).tolist() for column in features]
        budget = self.setting.chunk_tokens
        ways = [
            largest(lambda size: MiniBatch(rows=size), columns, budget, self.setting.batch),
            largest(lambda size: MiniBatch(tokens=size), columns, budget, budget),
        ]
        taken = []
        for way in ways:
            self.use(way)
            taken.append(spent(lambda: self.train(features))[0].computed)
        self.use(ways[taken.index(min(taken))])
        return self.mini_batch

    def prepare(self, pairs: Sequence[Pair]) -> Features:
        """From files to features, as its collator makes them: a column of queries with their prompt, one of targets."""
        queries = self.model.preprocess([self.input(pair.query) for pair in pairs], prompt=pairs[0].query.instruction)
        return [queries, self.model.preprocess([self.input(pair.positive) for pair in pairs])]

    def input(self, item: Item, lazy: bool = False) -> Any:
        """An item in the peer's own form."""
        if not item.images:
            return item.text
        picture = self.open(item, lazy)
        return {"image": picture, "text": item.text} if item.text else {"image": picture}

    def open(self, item: Item, lazy: bool) -> Image.Image:
        """The picture, decoded, or `lazy` with its size only: `encode` sorts by size and decodes when it comes to it."""
        picture = Image.open(item.images[0].source)  # type: ignore[arg-type]
        return picture if lazy else picture.convert("RGB")

    def train(self, features: Features) -> None:
        """One step of its trainer: loss, backward, clip, update."""
        self.model.train()
        self.backward(self.loss([self.move(column) for column in features], None))
        self.update()

    def move(self, column: dict[str, Any]) -> dict[str, Any]:
        """A column on the device."""
        return {name: value.to(self.setting.device) if isinstance(value, Tensor) else value for name, value in column.items()}

    def backward(self, loss: Tensor) -> None:
        """The second pass happens in here."""
        loss.backward()

    def update(self) -> None:
        """Clip as its trainer does, update, forget."""
        torch.nn.utils.clip_grad_norm_(self._trained().values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, features: Features) -> dict[str, Tensor]:
        """What a step would hand to the optimizer."""
        self.model.train()
        self.backward(self.loss([self.move(column) for column in features], None))
        torch.nn.utils.clip_grad_norm_(self._trained().values(), 1.0)
        found = {name: parameter.grad.clone() for name, parameter in self._trained().items()}  # type: ignore[union-attr]
        self.optimizer.zero_grad()
        return found

    # -- encoding --------------------------------------------------------------------------------------------------------------------------

    def encode(self, items: Sequence[Item]) -> Tensor:
        """Embeddings from files; one call for those with the instruction and one for those without, which its prompts need."""
        rows = torch.empty((len(items), self.width))
        options: dict[str, Any] = {"batch_size": self.rows_of_encode, "convert_to_tensor": True, "show_progress_bar": False}
        for instruction in dict.fromkeys(item.instruction for item in items):
            index = [row for row, item in enumerate(items) if item.instruction == instruction]
            inputs = [self.input(items[row], lazy=True) for row in index]
            rows[index] = self.model.encode(inputs, prompt=instruction or None, **options).cpu().float()
        return rows

    def tune_encode(self, lengths: Sequence[int]) -> int:
        """The largest batch whose padded tokens stay within our chunks when items are sorted, as `encode` sorts them."""
        way = largest(lambda size: MiniBatch(rows=size), [sorted(lengths, reverse=True)], self.setting.chunk_tokens, len(lengths))
        self.rows_of_encode = int(way.rows or 1)
        return self.rows_of_encode

    # -- profile ---------------------------------------------------------------------------------------------------------------------------

    def stages(self) -> list[tuple[Any, str, Label]]:
        """What to time under which name."""
        from sentence_transformers.base.losses import gradcache

        towers = [self.inner.get_submodule(name.removeprefix("model.")) for name in self.family.tower_names]
        return [
            (self, "open", "decode"),
            (self.processor.image_processor, "preprocess", "process pictures"),
            (self.model, "preprocess", "tokenize"),
            (gradcache, "_create_minibatch", "collate"),
            (self, "move", "transfer"),
            (self.model, "forward", language_pass),
            *((tower, "forward", "towers") for tower in towers),
            (self.loss, "calculate_loss", "loss"),
            (self, "backward", "backward"),
            (self, "update", "optimizer"),
        ]


def _named(saved: str) -> str:
    """A tensor of an adapter file as the model calls its parameter."""
    return saved.replace(".weight", ".default.weight")


def _allow_no_video() -> None:
    """Without torchvision, processors that could take videos cannot be made at all; pictures do not need that part."""
    if is_torchvision_available() or getattr(ProcessorMixin, "_without_video", False):
        return
    mixin: Any = ProcessorMixin
    every = mixin.get_attributes.__func__
    mixin.get_attributes = classmethod(lambda cls: [name for name in every(cls) if name != "video_processor"])
    mixin._without_video = True
