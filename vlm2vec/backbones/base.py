"""What differs between model families, behind two classes: a Processor (no weights, for loader workers) and a Backbone (the weights).

A family is one file with one subclass of each; giving `model_types` registers it. Everything around them (prompts, pooling, adapters,
training) is written once and never names a family.

Shape letters: C items in a chunk, L tokens, D hidden width.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm2vec.backbones.chat import RAW, ChatTemplate
from vlm2vec.backbones.last_layer import READ, narrow_last
from vlm2vec.backbones.loading import load_image_processor, load_model, load_tokenizer, no_bars
from vlm2vec.backbones.packed import boundaries, check_packs
from vlm2vec.backbones.pictures import PIXELS, VECTORS, apart, one_by_one
from vlm2vec.backbones.runs import Part as PromptPart
from vlm2vec.backbones.runs import Run, Text, cut, gather, whole
from vlm2vec.collate import Features, join_tokens, pad_tokens
from vlm2vec.config import RESOLUTIONS, ModelConfig
from vlm2vec.errors import DataError, ModelError, RecipeError
from vlm2vec.io import digest
from vlm2vec.log import get_logger
from vlm2vec.pooling import last_places
from vlm2vec.prompts import split

Part = Literal["language", "projector", "vision", "head"]
Assets = dict[str, str] | None  # text of small files by name
AnyProcessor = TypeVar("AnyProcessor", bound="Processor")
FAMILIES: dict[str, type[Backbone]] = {}  # by the `model_type` of config.json; filled as the family modules are imported

# Files beside the weights that we neither read nor change but that other libraries need to open what we save.
ASSETS = ("processor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json")
# Recipe keys that change what a processor gives.
FEATURE_OPTIONS = (
    *("max_tokens", "min_pixels", "max_pixels", "num_crops", "resize", "decode", "positions"),
    *("prompt", "system", "ending", "keep_stray"),
)
SHARD = "5GB"  # largest file of weights
MUCH_TOO_LONG = 10  # a text this many times over its limit is worth a warning

logger = get_logger(__name__)


class Processor(ABC):
    """Prompt and pictures of one item -> Features, and rows of Features -> a chunk, padded or packed. Pickles.

    Text is tokenized piece by piece with control tokens switched off, so nothing that a user writes can become one; image tokens are
    inserted by id. A text over its limit loses tokens from its end, a picture never does.
    """

    # What reads the files of a folder; the automatic classes follow what the files say.
    tokenizer_class: ClassVar[Any] = AutoTokenizer
    image_processor_class: ClassVar[Any] = AutoImageProcessor
    flat_positions: ClassVar[bool] = False  # whether `positions: flat` differs from the family's own and is followed
    packs: ClassVar[tuple[str, ...]] = ()  # types of language models with which items of this family can share a row
    margin: tuple[str, str] = ("", "")  # text on both sides of a picture, tokenized together with what stands there
    chat_mark: str | None = None  # what a chat template writes for a picture; the image token if None
    picture_inputs: tuple[str, ...] = (PIXELS,)  # what the model needs of a picture, each joined along its first dimension

    def __init__(self, tokenizer: Any, image_processor: Any, options: ModelConfig, config: Any, assets: Assets = None) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.options = options
        self.assets = assets or {}
        self.image_token_id: int = config.image_token_id
        if options.positions == "flat" and not self.flat_positions:
            raise RecipeError("model.positions: flat is only for models that lay pictures out in two dimensions; leave it native")
        if self.packed:
            check_packs(config, self.packs)
        self.limit_pixels(options.min_pixels, options.max_pixels)
        self.limit_crops(options.num_crops)
        self._protect(self.control_tokens())
        self.prefix, self.suffix = self._frame()
        self.chat = self._chat_template() if options.prompt == "chat" else None
        self._warned = False

    @classmethod
    def load(cls: type[AnyProcessor], folder: Path, options: ModelConfig, config: Any) -> AnyProcessor:
        """Read the tokenizer and image processor in `folder`; `config` is the model's. Raises ModelError on a file that cannot be used."""
        assets = {name: (folder / name).read_text(encoding="utf-8") for name in ASSETS if (folder / name).is_file()}
        tokenizer = load_tokenizer(folder, options, cls.tokenizer_class)
        return cls(tokenizer, load_image_processor(folder, options, cls.image_processor_class), options, config, assets)

    # -- what a family says ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """Model inputs of one RGB picture, without a batch dimension beyond what the family needs."""

    @abstractmethod
    def image_token_ids(self, inputs: dict[str, Tensor]) -> list[int]:
        """The ids that stand for a picture in the token sequence, one image token per feature vector and any markers around them."""

    @abstractmethod
    def count_image_tokens(self, width: int, height: int) -> int:
        """How many ids `image_token_ids` will give for a picture of this size: arithmetic only, so that it can be asked before decoding."""

    @abstractmethod
    def collate_images(self, rows: Sequence[Features], input_ids_CL: Tensor) -> dict[str, Tensor]:
        """Model inputs of a chunk beside `input_ids` and `attention_mask`, those of `pictures` among them."""

    def joined(self, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the vision tower needs of one or more pictures at once."""
        return {name: torch.cat([image[name] for image in images]) for name in self.picture_inputs}

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """The largest width and height that the family scales a picture of this size to; by default it is taken to use every pixel."""
        return width, height

    def control_tokens(self) -> list[str]:
        """Tokens that only we may insert, beside those that the tokenizer already treats as special."""
        return [self.image_token]

    def limit_pixels(self, smallest: int | None, largest: int | None) -> None:
        """Tell the image processor the picture area that the recipe asks for. Raises RecipeError where the family cannot follow."""
        if smallest or largest:
            key = f"model.{'min' if smallest else 'max'}_pixels"
            raise RecipeError(f"{key}: this model has one fixed picture size, or tiles of one; leave it null, or use model.resize")

    def limit_crops(self, crops: int | None) -> None:
        """Tell the image processor how many crops the recipe allows a picture. Raises RecipeError where the family cannot follow."""
        if crops:
            raise RecipeError("model.num_crops: this model does not cut pictures into a chosen number of crops; leave it null")

    def text_budget(self, image_tokens: int) -> int:
        """How many text tokens fit beside `image_tokens` image tokens."""
        return self.options.max_tokens

    # -- what is the same for all ----------------------------------------------------------------------------------------------------------

    def features(self, prompt: str, images: Sequence[Image.Image | dict[str, Tensor]], instruction: str = "") -> Features:
        """Tokens and pixels of one item. Raises DataError when prompt and pictures do not match, or when there is nothing to embed.

        A picture is an RGB image, or what `picture` or a feature cache made of one. With `prompt: chat` the prompt is a user turn after
        `instruction`, or `model.system` where there is none; else it holds all text.
        """
        pieces = split(prompt, len(images))
        order = [piece for piece in pieces if isinstance(piece, int)]
        for index in sorted(set(range(len(images))) - set(order)):
            raise DataError(f"prompt has no placeholder for picture {index + 1} of {len(images)}: {prompt[:80]!r}")
        inputs = {index: image if isinstance(image := images[index], dict) else self.picture(image) for index in order}
        tokens = {index: self.image_token_ids(inputs[index]) for index in order}
        plain = [Text(piece) if isinstance(piece, str) else piece for piece in pieces]
        runs = gather(self._chat_parts(pieces, instruction) if self.chat else plain, self.margin)
        texts, lost = self._fit([run for run in runs if isinstance(run, list)], self.text_budget(sum(map(len, tokens.values()))))
        text, ids = iter(texts), list[int]()
        for run in runs:
            ids += tokens[run] if isinstance(run, int) else run if isinstance(run, tuple) else next(text)
        ids = self._complete(ids) if self.chat else self.wrap(ids)
        if not ids:
            raise DataError("prompt has neither text nor image: there is nothing to embed")
        return Features(torch.tensor(ids, dtype=torch.long), [inputs[index] for index in order], lost)

    def picture(self, image: Image.Image) -> dict[str, Tensor]:
        """Model inputs of one RGB picture, after `model.resize`."""
        return self.image_inputs(self._resized(image))

    def image_tokens_estimate(self, width: int, height: int) -> int:
        """How many ids a picture of this size will take, after `model.resize`: arithmetic only, so that it can be asked before decoding."""
        return self.count_image_tokens(*([self.edge_after_resize] * 2 if self.edge_after_resize else (width, height)))

    def needed_size(self, width: int, height: int) -> tuple[int, int]:
        """To what size a picture of this size is first scaled, by `model.resize` or by the family: arithmetic only."""
        edge = self.edge_after_resize
        return (edge, edge) if edge else self.scaled_size(width, height)

    @property
    def edge_after_resize(self) -> int | None:
        """Edge of the square that every picture is squashed to before the family sees it; None to leave pictures as they are."""
        size = self.options.resize
        return RESOLUTIONS[size] if isinstance(size, str) else size

    def wrap(self, ids: list[int]) -> list[int]:
        """`ids` between the tokens that the tokenizer's own template puts around a text, such as [CLS] and [SEP] or a beginning of text."""
        return [*self.prefix, *ids, *self.suffix]

    def collate(self, rows: Sequence[Features]) -> dict[str, Tensor]:
        """One chunk of `rows`: `input_ids` and `attention_mask` as `lay_out` gives them, and what the family adds."""
        input_ids_CL, mask_CL = self.lay_out([row.input_ids for row in rows], self.pad_id)
        return {"input_ids": input_ids_CL, "attention_mask": mask_CL, **self.collate_images(rows, input_ids_CL)}

    def lay_out(self, rows: Sequence[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
        """One value per token of each item (L_i,) -> those of the chunk, and a mask (C, L) that is 1 for each token of an item.

        Rows are padded to (C, L) with `fill`, or packed: one behind the other in (1, T), and then the mask tells their lengths.
        """
        return join_tokens(rows) if self.packed else pad_tokens(rows, fill, self.options.padding_side)

    def pictures(self, rows: Sequence[Features]) -> dict[str, Tensor]:
        """The pictures of a chunk, row after row: joined, or one by one where some of them come as features; empty if there are none."""
        images = [image for row in rows for image in row.images]
        if any(VECTORS in image for image in images):
            return one_by_one([{VECTORS: image[VECTORS]} if VECTORS in image else self.joined([image]) for image in images])
        return self.joined(images) if images else {}

    def positions(self, rows: Sequence[Features]) -> Tensor:
        """Position ids as `lay_out` gives them, which count from 0 at the first token of each item; 0 on padding."""
        return self.lay_out([torch.arange(len(row)) for row in rows])[0]

    @property
    def packed(self) -> bool:
        """Whether the items of a chunk share one row."""
        return self.options.attention == "packed"

    @property
    def pad_id(self) -> int:
        """Id on padding; the mask hides it, so any valid id serves where a tokenizer has none."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @cached_property
    def image_token(self) -> str:
        """The token whose id stands for a picture."""
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if token is None:
            raise ModelError(f"tokenizer has no token {self.image_token_id}, which stands for a picture; it does not belong to this model")
        return token

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that the output of `features` depends on beside its arguments."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        parts = {
            "class": type(self).__name__,
            "tokenizer": {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")},
            "image_processor": json.loads(self.image_processor.to_json_string()),
            "image_token_id": self.image_token_id,
            "options": [getattr(self.options, key) for key in FEATURE_OPTIONS],
            "chat_template": self.chat and self.chat.template,
            "backend": ["pil", version("pillow"), version("transformers"), version("tokenizers")],
        }
        return digest(parts)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer, image processor and the files kept for other libraries, in the Hugging Face layout."""
        self.tokenizer.save_pretrained(str(directory))
        self.image_processor.save_pretrained(str(directory))
        for name, text in self.assets.items():
            (Path(directory) / name).write_text(self._current(name, text), encoding="utf-8")

    def _current(self, name: str, text: str) -> str:
        """A kept file; where it nests the image processor's settings, which then win over preprocessor_config.json, those in use now."""
        if name != "processor_config.json" or "image_processor" not in (nested := json.loads(text)):
            return text
        return json.dumps({**nested, "image_processor": json.loads(self.image_processor.to_json_string())}, indent=2, sort_keys=True) + "\n"

    def _protect(self, tokens: Sequence[str]) -> None:
        """Mark `tokens` special: `split_special_tokens` still matches added tokens that are not, as `<row_1_col_1>` may be."""
        added = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        plain = [added.get(token, AddedToken(token)) for token in tokens if token not in added or not added[token].special]
        marked = [AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=True) for token in plain]
        self.tokenizer.add_tokens(marked, special_tokens=True)

    def _frame(self) -> tuple[list[int], list[int]]:
        plain, framed = self._encode("a"), self.tokenizer("a", split_special_tokens=True)["input_ids"]
        start = next((at for at in range(len(framed)) if framed[at : at + len(plain)] == plain), None)
        if start is None:
            raise ModelError("tokenizer changes a text when it adds special tokens; this is not supported")
        return framed[:start], framed[start + len(plain) :]

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            before = text[max(0, error.start - 20) : error.start]
            raise DataError(f"text holds a lone surrogate at character {error.start}, after {before!r}") from None
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _fit(self, runs: Sequence[Run], budget: int) -> tuple[list[list[int]], int]:
        """Token ids of each run of text, at most `budget` of them the item's own, and how many of those were cut."""
        ids = whole(runs, self._encode)
        total = sum(map(len, ids))
        own = total - sum(len(self._encode(text.words)) for run in runs for text in run if not text.own)
        if own <= budget:
            return ids, 0
        self._warn(own, budget)
        ids = cut(runs, budget, self._encode)
        return ids, total - sum(map(len, ids))

    def _chat_template(self) -> ChatTemplate:
        """The checkpoint's own template, from where old or new repositories keep it."""
        stored = json.loads(self.assets.get("chat_template.json", "{}")).get("chat_template")
        template = self.tokenizer.chat_template or stored
        if not isinstance(template, str):
            raise ModelError(f"the model has no chat template; {RAW}")
        return ChatTemplate(self.tokenizer, template, self.chat_mark or self.image_token, self.options.ending or "")

    def _chat_parts(self, pieces: Sequence[str | int], instruction: str) -> Sequence[PromptPart]:
        """The turns of a chat. Newlines around texts go: they set pictures and texts apart in raw prompts, which the template does here."""
        bare = [piece.strip("\n") if isinstance(piece, str) else piece for piece in pieces]
        content = [piece for piece in bare if piece != ""]
        if not content or self.chat is None:
            raise DataError("prompt has neither text nor image: there is nothing to embed")
        return self.chat.parts(instruction or self.options.system or "", content)

    def _complete(self, ids: list[int]) -> list[int]:
        """`ids` of a chat with the tokenizer's own first and last tokens where the template did not write them."""
        start = [] if ids[: len(self.prefix)] == self.prefix else self.prefix
        end = [] if ids[len(ids) - len(self.suffix) :] == self.suffix else self.suffix
        return [*start, *ids, *end]

    def _resized(self, image: Image.Image) -> Image.Image:
        edge = self.edge_after_resize
        return image.resize((edge, edge), Image.Resampling.BICUBIC) if edge else image

    def _warn(self, total: int, budget: int) -> None:
        if total > MUCH_TOO_LONG * budget and not self._warned:
            logger.warning("a text of %d tokens was cut to %d (model.max_tokens); further ones are cut without a warning", total, budget)
            self._warned = True


class Backbone(nn.Module, ABC):
    """A transformers model read as an encoder: its inner model is called, its language head never.

    `model` is kept whole (the ForConditionalGeneration class where there is one), so adapter keys and checkpoints are the family's own.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    processor_class: ClassVar[type[Processor]]
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    # Name component -> part; the first entry that occurs in a dotted name decides, so put what lies inside another first.
    parts: dict[str, Part] = {}
    aliases: ClassVar[dict[str, str]] = {}  # other names of tensors, read where a checkpoint lacks their own
    ignores_shipped_code: ClassVar[bool] = False  # whether folders of this family may bring code, none of which is ever run
    # Of transformers' own model and processor: why they do not give our embeddings, "" where they do, and whether the processor can tell
    # a control token that a user writes from one of the format.
    differs_elsewhere: ClassVar[str] = ""
    guarded_elsewhere: ClassVar[bool] = True
    tower_names: tuple[str, ...] = ()  # dotted paths in `model`, in the order in which pixels pass through them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FAMILIES.update(dict.fromkeys(cls.model_types, cls))

    def __init__(self, model: Any, processor: Processor, options: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.options = options
        # Whether the last layer computes only what is read; of a model that nobody wrote a family for it is not known what it hands on.
        self.narrows = model.config.model_type in self.model_types and narrow_last(model, processor.packs)

    @classmethod
    def load(cls, path: Path, options: ModelConfig) -> Backbone:
        """Read a checkpoint folder strictly. Raises ModelError on a missing, unexpected or damaged tensor or file."""
        model = load_model(cls.auto_class, path, options, cls.aliases)
        return cls(model, cls.processor_class.load(path, options, model.config), options)

    @classmethod
    @abstractmethod
    def tiny_checkpoint(cls, to: Path, seed: int = 0, model_type: str | None = None) -> Path:
        """Write a random miniature in the family's real checkpoint layout; equal seeds give equal tensors."""

    @property
    def hidden_size(self) -> int:
        """D, the width of an embedding."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def inner(self) -> Any:
        """The model without its head."""
        return self.model.model

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states of a collated chunk, for every place of its `input_ids`: (C, L, D), or (1, T, D) where it is packed.

        Of a batch that `read_last` gave, only those that are read.
        """
        return self.inner(**self.inputs(batch), use_cache=False).last_hidden_state

    def read_last(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch`, of whose states only those at the last real token of each item will be read: where the model `narrows`, the last layer
        leaves the others unfinished.
        """
        return {**batch, READ: last_places(batch["attention_mask"], self.processor.packed)} if self.narrows else batch

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """A collated chunk as the model takes it: where it is packed, the boundaries of items in the place of the mask; where its pictures
        come one by one, the features of all.
        """
        rest, pictures = apart(batch)
        seen: dict[str, Any] = {"mm_encoder_outputs": {"image": self.as_output(self.vectors(pictures))}} if pictures else {}
        if self.processor.packed:
            seen |= boundaries(rest.pop("attention_mask"))
        return {**rest, **seen}

    # -- pictures as features: a frozen tower sees a picture once, and the model gets what it made of it ---------------------------------

    @property
    def takes_features(self) -> bool:
        """Whether the model can be given features instead of pixels."""
        return "mm_encoder_outputs" in inspect.signature(self.inner.forward).parameters

    def picture_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the towers make of one picture, from `Processor.joined`: (V, D), or (T, V, D) in families that keep tiles apart."""
        pooled = self.inner.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat(list(pooled)) if isinstance(pooled, list | tuple) else pooled

    def vectors(self, pictures: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """The features of each picture, computed where they are not there yet."""
        return [picture[VECTORS] if VECTORS in picture else self.picture_features(picture) for picture in pictures]

    def as_output(self, vectors: list[Tensor]) -> Any:
        """What the model's own `get_image_features` would return for these pictures: a list of (V, D), or all tiles in one tensor."""
        return BaseModelOutputWithPooling(pooler_output=vectors if vectors[0].ndim == 2 else torch.cat(vectors))  # type: ignore[arg-type]

    def part_of(self, name: str) -> Part:
        """The part that a parameter or module of `model` belongs to, by its dotted name. Raises ModelError for a name outside all parts."""
        components = name.split(".")
        for component, part in self.parts.items():
            if component in components:
                return part
        raise ModelError(f"{name}: belongs to no known part of a {self.model.config.model_type} model")

    def towers(self) -> list[nn.Module]:
        """Modules that turn pixels into what the language model reads, in order: the vision tower, then a projector of its own."""
        return [self.model.get_submodule(name) for name in self.tower_names]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights, configuration, tokenizer and image processor in the family's Hugging Face layout."""
        with no_bars():
            self.model.save_pretrained(str(directory), max_shard_size=SHARD)
        self.processor.save_pretrained(directory)
