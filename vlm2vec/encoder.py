"""Items in, unit embeddings out: the object that users hold.

Shape letters: N items, C items in a chunk, L tokens, D embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vlm2vec import log, prompts
from vlm2vec.backbones import load_backbone, published, resolve
from vlm2vec.backbones.base import FEATURE_OPTIONS, Backbone, Processor
from vlm2vec.backbones.pictures import PIXELS, VECTORS
from vlm2vec.backbones.weights import misfit, read_safetensors
from vlm2vec.batch import featurize
from vlm2vec.chunks import plan_chunks
from vlm2vec.collate import Features, moved
from vlm2vec.config import LoraConfig, ModelConfig, check_model
from vlm2vec.data import images
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import AdapterError, InputError, ModelError, RecipeError, Vlm2VecError
from vlm2vec.io import digest, read_json, write_json
from vlm2vec.lora import ADAPTER_CONFIG, add_lora, changes_nothing, load_adapter, save_adapter
from vlm2vec.pooling import check_rows, normalize, pool
from vlm2vec.transport import read_ahead

SETTINGS = "vlm2vec.json"
TRAINED_PARTS = "trained_parts.safetensors"
SAVED_OPTIONS = ("pooling", "padding_side", *FEATURE_OPTIONS)
WINDOW = 1024  # items whose features `encode` holds at once
BLOCK = 16  # items that a worker takes at a time

logger = log.get_logger(__name__)

ItemLike = str | Image.Image | dict[str, Any] | Item


def as_item(value: ItemLike, instruction: str = "") -> Item:
    """Make an Item of a string, a PIL image or {"text", "image", "instruction"}; `instruction` fills in where none is given."""
    if isinstance(value, Item):
        return value if value.instruction else replace(value, instruction=instruction)
    if isinstance(value, str):
        return Item(text=value, instruction=instruction)
    if isinstance(value, Image.Image):
        return Item(images=(ImageRef(value),), instruction=instruction)
    if not isinstance(value, dict):
        raise InputError(f"cannot embed a {type(value).__name__}; give a string, a PIL image or a dict with text, image, instruction")
    unknown = sorted(value.keys() - {"text", "image", "instruction"})
    if unknown:
        raise InputError(f"item has unknown key {unknown[0]!r}; the keys are text, image, instruction")
    images = tuple(_image_ref(image) for image in _as_list(value.get("image")))
    item = Item(value.get("text") or "", images, value.get("instruction") or instruction)
    if not item.text.strip() and not item.images:
        raise InputError("item has neither text nor image")
    return item


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _image_ref(image: Any) -> ImageRef:
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, str | Path):
        return ImageRef(Path(image), f"image '{image}'")
    if isinstance(image, bytes | Image.Image):
        return ImageRef(image)
    raise InputError(f"image must be a path, bytes or a PIL image, got {type(image).__name__}")


class _Featurizer(torch.utils.data.Dataset):
    """A block of items as features. An error is returned rather than raised: torch would wrap it in the traceback of a worker."""

    def __init__(self, processor: Processor, items: Sequence[Item]) -> None:
        self.processor, self.items = processor, items

    def __getitem__(self, block: range) -> list[Features] | Vlm2VecError:
        try:
            return [featurize(self.processor, self.items[index]) for index in block]
        except Vlm2VecError as error:
            return error


def _blocks(sizes: Iterable[int]) -> Iterator[range]:
    """Consecutive indices in blocks of at most BLOCK, none of which reaches beyond its window; `sizes` are those of the windows."""
    end = 0
    for size in sizes:
        start, end = end, end + size
        yield from (range(first, min(first + BLOCK, end)) for first in range(start, end, BLOCK))


class Encoder:
    """A backbone, its pooling and its prompt rules: `encode` gives an (N, D) float32 tensor of unit rows, in the order of its input."""

    def __init__(self, backbone: Backbone, adapter: PeftModel | None = None) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self.options = backbone.options
        self.trained_parts: tuple[str, ...] = ()  # names of the tensors trained in full, saved beside an adapter
        self.source = backbone.options.path  # what people call this model: where it was loaded from or written to
        self.precision = "fp32"  # "bf16" runs the backbone under autocast
        self.query_instruction = ""
        self.target_instruction = ""

    # -- making and saving ---------------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, model: ModelConfig, lora: LoraConfig | None = None) -> Encoder:
        """The starting point of a training run: the base model of the recipe, with a fresh adapter if it asks for one."""
        backbone = load_backbone(model)
        return cls(backbone, add_lora(backbone, lora) if lora else None)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapter: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Encoder:
        """Load what `save_pretrained` or a run wrote, a plain Hugging Face model, or an adapter whose base is found from its settings.

        `path` and `adapter` are a folder, a Hub id or `builtin/<name>`. With `adapter`, `path` is its base, whatever its own files name.
        `options` are keys of the recipe's `model` section; they win over what was saved, and that over the table of known checkpoints.
        Raises ModelError or AdapterError if anything is missing, unexpected or damaged.
        """
        folder = resolve(ModelConfig(path=str(path), revision=revision))
        if adapter is None and (folder / ADAPTER_CONFIG).exists():
            saved = _settings(folder, path)
            base = saved.get("base") or _named_base(folder)
            encoder = cls._load(base["path"], base["revision"], folder, saved, options)
        else:
            adapter_folder = resolve(ModelConfig(path=str(adapter))) if adapter is not None else None
            saved = _settings(adapter_folder, str(adapter)) if adapter_folder else _settings(folder, path)
            encoder = cls._load(str(path), revision, adapter_folder, saved, options)
        encoder.source = str(path)
        encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        encoder.backbone.model.eval()
        return encoder

    @classmethod
    def _load(cls, path: str, revision: str | None, adapter: Path | None, saved: dict[str, Any], options: dict[str, Any]) -> Encoder:
        backbone = load_backbone(ModelConfig(**{**saved.get("model", {}), **options, "path": path, "revision": revision}))
        encoder = cls(backbone, load_adapter(backbone, adapter) if adapter else None)
        if adapter:
            encoder._check_adapter(adapter, stated={**saved.get("model", {}), **options})
        if adapter and (adapter / TRAINED_PARTS).exists():
            encoder._load_parts(adapter / TRAINED_PARTS)
        encoder.query_instruction = saved.get("query_instruction", "")
        encoder.target_instruction = saved.get("target_instruction", "")
        return encoder

    def _check_adapter(self, folder: Path, stated: Collection[str]) -> None:
        """Say what an adapter that fits may still hide: that it does nothing, or was trained with other token positions.

        One of ours may do nothing yet, early in a run's warm-up; one that others published and that does nothing is not what they trained.
        """
        ours = (folder / SETTINGS).exists()
        if self.adapter is not None and changes_nothing(self.adapter):
            said = f"{folder}: every lora_B is zero, so the embeddings are those of the base model"
            if not ours:
                raise AdapterError(f"{said}; the adapter is damaged or was never trained: download or copy it again")
            logger.warning(said)
        if self.processor.flat_positions and not ours and "positions" not in stated:
            logger.warning(
                "%s: nothing says which token positions it was trained with; the family's own are used. "
                "VLM2Vec's published code trained with positions='flat'; give `positions` to choose",
                folder,
            )

    def save_pretrained(self, directory: str | Path, **extra: Any) -> None:
        """Write a folder that `from_pretrained` reads: a PEFT adapter (with the parts trained in full beside it), or else the whole model.

        Both forms hold the processor and `vlm2vec.json`; `extra` is stored there too.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            self.backbone.save_pretrained(directory)
        else:
            save_adapter(self.adapter, directory)
            base = self._base_parameters()
            parts = {name: base[name].detach().cpu().contiguous() for name in self.trained_parts}
            if parts:
                save_file(parts, directory / TRAINED_PARTS, metadata={"format": "pt"})
            self.backbone.processor.save_pretrained(directory)
        write_json(directory / SETTINGS, {**self._saved_settings(), **extra})

    def _saved_settings(self) -> dict[str, Any]:
        options = asdict(self.options)
        return {
            "format": 1,
            "model": {key: options[key] for key in SAVED_OPTIONS},
            "base": {"path": self.options.path, "revision": self.options.revision} if self.adapter else None,
            "query_instruction": self.query_instruction,
            "target_instruction": self.target_instruction,
        }

    def _base_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the base model by the names they have without an adapter."""
        return {name.replace(".base_layer.", "."): parameter for name, parameter in self.model.named_parameters() if "lora_" not in name}

    def _load_parts(self, file: Path) -> None:
        found = read_safetensors(file)
        parameters = self._base_parameters()
        if problem := misfit({name: parameters[name] for name in found if name in parameters}, found):
            raise AdapterError(f"{file}: {problem}")
        with torch.no_grad():
            for name, tensor in found.items():
                parameters[name].copy_(tensor)
        self.trained_parts = tuple(sorted(found))

    def train_only(self, parts: Sequence[str]) -> None:
        """Make the adapter and the tensors of `parts` trainable and nothing else. A head that no embedding reads is never trained."""
        base = self._base_parameters()
        self.trained_parts = tuple(sorted(name for name in base if self.backbone.part_of(name) in parts))
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.replace(".base_layer.", ".") in self.trained_parts)

    def recompute_activations(self, on: bool) -> None:
        """Keep only the inputs of layers for the backward pass, or all activations: memory against time, the gradient is the same."""
        if on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.disable_input_require_grads()  # what reentrant recomputation needs; here it would only lengthen the backward pass
        elif self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()

    # -- the model -----------------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The transformers model, adapters injected."""
        return self.backbone.model

    @property
    def processor(self) -> Processor:
        return self.backbone.processor

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Encoder:
        self.backbone.to(device)
        return self

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """(C, D) float32 unit rows of a collated chunk, differentiable. A zero or non-finite embedding is a row of NaN: `check_rows`."""
        how = self.options.pooling
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden_CLD = self.backbone.hidden(self.backbone.read_last(batch) if how == "last" else batch)
        return normalize(pool(hidden_CLD, batch["attention_mask"], how))

    @torch.no_grad()
    def picture_features(self, picture: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stands for a picture in `Processor.features` instead of `Processor.picture`: its features, on the CPU, in place of pixels.

        Call it inside `evaluating`. The model sees the picture alone, so the features depend on nothing else.
        """
        inputs = moved(self.processor.joined([picture]), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            vectors = self.backbone.picture_features(inputs)
        return {**{name: tensor for name, tensor in picture.items() if name != PIXELS}, VECTORS: vectors.cpu().contiguous()}

    def fingerprint(self) -> str:
        """Digest of all that an embedding depends on beside its item: weights, processor, pooling, precision, prompt rules."""
        settings = [self.options.pooling, self.options.padding_side, self.options.attention, self.precision, prompts.VERSION]
        return digest([_weights_digest(self.model.state_dict()), self.processor.fingerprint, settings])

    def towers_fingerprint(self) -> str:
        """Digest of all that a picture's features depend on beside its content: weights of the towers, processor, precision, decoder."""
        state = self.model.state_dict()
        towers = {name: tensor for name, tensor in state.items() if self.backbone.part_of(name) in ("vision", "projector")}
        settings = [self.options.attention, self.precision, self.device.type, images.DECODE_VERSION]
        return digest([_weights_digest(towers), self.processor.fingerprint, settings])

    # -- encoding ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, items: Sequence[ItemLike], *, instruction: str = "", chunk_tokens: int = 32768, workers: int = 0, progress: bool = False
    ) -> Tensor:
        """Embed `items` (N) -> (N, D) float32 unit rows on the CPU, in the order of the input. Equal items are computed once.

        Each item is a string, a PIL image or {"text", "image", "instruction"} with image a path, PIL image, bytes or a list of them.
        `chunk_tokens` bounds the tokens of one forward, padding included; the result does not depend on it.
        """
        if isinstance(items, str | dict | Image.Image | Item):
            raise InputError("encode takes a list of items; wrap the single item in a list")
        made = [as_item(item, instruction) for item in items]
        distinct = list({item.key: item for item in made}.values())
        if not distinct:
            return torch.zeros((0, self.backbone.hidden_size))
        windows = [min(WINDOW, len(distinct) - start) for start in range(0, len(distinct), WINDOW)]
        rows = []
        with log.progress(len(distinct), "encoding", "item", enabled=None if progress else False) as bar:
            for window_ND in self.stream(distinct, windows, chunk_tokens=chunk_tokens, workers=workers):
                rows.append(window_ND)
                bar.update(len(window_ND))
        position = {item.key: index for index, item in enumerate(distinct)}
        return torch.cat(rows)[[position[item.key] for item in made]]

    @torch.no_grad()
    def stream(self, items: Sequence[Item], sizes: Sequence[int], *, chunk_tokens: int = 32768, workers: int = 0) -> Iterator[Tensor]:
        """Embeddings of consecutive windows of `items`, of `sizes` items each: (size, D) float32 on the CPU, one window held at a time.

        What a window gives depends on its own items and `chunk_tokens` only. `workers` processes decode and tokenize ahead, across windows.
        """
        blocks = read_ahead(_Featurizer(self.processor, items), _blocks(sizes), workers)
        for size in sizes:
            window: list[Features] = []
            while len(window) < size:
                found = next(blocks)
                if isinstance(found, Vlm2VecError):
                    raise found
                window += found
            yield self.embed_features(window, chunk_tokens)

    def encode_query(self, items: Sequence[ItemLike], **options: Any) -> Tensor:
        """`encode` with the query instruction that the model was saved with, where an item brings none."""
        return self.encode(items, **{"instruction": self.query_instruction, **options})

    def encode_target(self, items: Sequence[ItemLike], **options: Any) -> Tensor:
        """`encode` with the target instruction that the model was saved with, where an item brings none."""
        return self.encode(items, **{"instruction": self.target_instruction, **options})

    @staticmethod
    def similarity(query_BD: Tensor, target_ND: Tensor) -> Tensor:
        """Cosine similarity (B, N) of unit rows, in float32."""
        return query_BD.float() @ target_ND.float().T

    @torch.no_grad()
    def embed_features(self, window: Sequence[Features], chunk_tokens: int = 32768) -> Tensor:
        """Embeddings (N, D) float32 on the CPU of N items that are features already, in their order.

        Raises NonFiniteError when one of them is zero, infinite or not a number.
        """
        rows_ND = torch.empty((len(window), self.backbone.hidden_size), device=self.device)
        with self.evaluating():
            for chunk in plan_chunks([len(features) for features in window], chunk_tokens, self.processor.packed):
                inputs = self.processor.collate([window[index] for index in chunk])
                rows_ND[torch.tensor(chunk, device=self.device)] = self.embed(moved(inputs, self.device))
        rows_ND = rows_ND.cpu()  # the first time that a GPU is waited for
        check_rows(rows_ND)
        return rows_ND

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside; each module gets its own mode back, for a trained model mixes both."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _weights_digest(state: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _settings(folder: Path, called: str | Path) -> dict[str, Any]:
    """What `save_pretrained` stored beside the weights, or what is known about the published model that `called` names; else empty."""
    file = folder / SETTINGS
    if not file.exists():
        return published.settings(str(called))
    settings = _object(file)
    if settings.get("format") != 1:
        raise ModelError(f"{file}: written in format {settings.get('format')}; this version reads format 1, upgrade vlm2vec")
    _check_settings(settings, file)
    return settings


def _object(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected an object of settings, got {type(found).__name__}")
    return found


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    """Raise ModelError unless `settings` are what `save_pretrained` writes: a file from elsewhere must not turn on what only a user may."""
    model = settings.get("model") or {}
    strangers = sorted(model.keys() - set(SAVED_OPTIONS)) if isinstance(model, dict) else ["model"]
    if strangers:
        raise ModelError(f"{file}: {strangers[0]} is no setting that an encoder is saved with; those are {', '.join(SAVED_OPTIONS)}")
    try:
        check_model(model, str(file))
    except RecipeError as error:
        raise ModelError(str(error)) from error
    base = settings.get("base") or {"path": ""}
    texts = [settings.get(key, "") for key in ("query_instruction", "target_instruction")]
    if not isinstance(base, dict) or not all(isinstance(text, str) for text in (*texts, base.get("path"), base.get("revision") or "")):
        raise ModelError(f"{file}: base must name a path and a revision, and the instructions must be text; get the folder again")


def _named_base(folder: Path) -> dict[str, Any]:
    """Base model named in a PEFT adapter that others made."""
    config = _object(folder / ADAPTER_CONFIG)
    if not config.get("base_model_name_or_path"):
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no base model; give the base as path and this folder as adapter")
    return {"path": config["base_model_name_or_path"], "revision": config.get("revision")}
