"""The fixed samples through four tools: this library, transformers alone, sentence-transformers and vLLM.

Each function takes a folder, a device and a number format, and gives the embeddings with what the model was fed, so that a difference can
be traced: to token ids, to pixels, or to neither.

Shape letters: N items of a group, D embedding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm2vec.backbones.loading import no_bars
from vlm2vec.backbones.pictures import PIXELS
from vlm2vec.batch import featurize
from vlm2vec.encoder import Encoder, as_item
from vlm2vec.io import read_json
from vlm2vec.pictures_only import pictures_only
from vlm2vec.plain import POOLS, token_states
from vlm2vec.samples import Group, groups

ST_MODULE = "vlm2vec.integrations.sentence_transformers.Vlm2Vec"  # ours, as `modules.json` names it


@dataclass(frozen=True)
class Fed:
    """What a model was given for one item: token ids, and mean and spread of its pixels (0 and 0 without a picture)."""

    tokens: tuple[int, ...]
    pixels: tuple[float, float]

    @classmethod
    def of(cls, tokens: Tensor, pixels: Tensor | None) -> Fed:
        """From ids (L,) without padding and pixels of any shape."""
        spread = (float(pixels.double().mean()), float(pixels.double().std())) if pixels is not None else (0.0, 0.0)
        return cls(tuple(tokens.tolist()), spread)


@dataclass
class Seen:
    """Embeddings (N, D) float32 by group, and what was fed by the id of an item."""

    embeddings: dict[str, Tensor] = field(default_factory=dict)
    fed: dict[str, Fed] = field(default_factory=dict)


def ours(folder: Path, device: str, dtype: str, settings: Mapping[str, Any]) -> Seen:
    """This library."""
    return seen_by(Encoder.from_pretrained(folder, device=device, dtype=dtype))


def seen_by(encoder: Encoder) -> Seen:
    """The samples through an encoder."""
    seen = Seen()
    for group in groups():
        seen.embeddings[group.name] = encoder.encode(group.items, instruction=group.instruction)
        for name, item in zip(group.ids, group.items, strict=True):
            made = featurize(encoder.processor, as_item(item, group.instruction))
            seen.fed[name] = Fed.of(made.input_ids, torch.cat([image[PIXELS].flatten() for image in made.images]) if made.images else None)
    return seen


def plain(folder: Path, device: str, dtype: str, settings: Mapping[str, Any]) -> Seen:
    """transformers alone, as the card of the export shows it."""
    with _quiet(), pictures_only():
        number = getattr(torch, dtype)
        model = transformers.AutoModel.from_pretrained(str(folder), dtype=number, trust_remote_code=False).to(device).eval()
        processor = transformers.AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
        options = {"sanitize_control_tokens": settings["export"]["guarded"], "processor_kwargs": {"padding": True}}

        def batch(conversations: list[Any]) -> Any:
            return processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt", **options)

        pool = POOLS[settings["model"]["pooling"]]
        return _run(lambda group: pool(*token_states(model, batch(_conversations(group)))), lambda one: batch(_conversations(one)))


def sentence_transformers(folder: Path, device: str, dtype: str, settings: Mapping[str, Any]) -> Seen:
    """sentence-transformers. Of modules that are not its own it imports ours, where there is no other: nothing in the folder is run."""
    from sentence_transformers import SentenceTransformer

    modules = [module.get("type") for module in read_json(folder / "modules.json")]
    with _quiet(), pictures_only():
        model: Any = SentenceTransformer(
            str(folder),
            device=device,
            trust_remote_code=modules == [ST_MODULE],
            model_kwargs={"dtype": getattr(torch, dtype)},
            local_files_only=True,
        )

        def embed(group: Group) -> Tensor:
            options = {"prompt": group.instruction or None, "convert_to_tensor": True, "show_progress_bar": False}
            return model.encode([_bare(item) for item in group.items], **options).float()

        return _run(embed, lambda one: model.preprocess([_bare(item) for item in one.items], prompt=one.instruction or None))


def vllm(folder: Path, device: str, dtype: str, settings: Mapping[str, Any]) -> Seen:
    """vLLM's pooling runner, fed with the ids of the rendered template."""
    from vllm import LLM

    engine = LLM(model=str(folder), runner="pooling", dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    seen = Seen()
    for group in groups():
        inputs = []
        for item, conversation in zip(group.items, _conversations(group), strict=True):
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
            pictures = {"multi_modal_data": {"image": item["image"]}} if "image" in item else {}
            inputs.append({"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"], **pictures})
        seen.embeddings[group.name] = torch.tensor([output.outputs.embedding for output in engine.embed(inputs)])
    return seen


OTHERS: dict[str, Callable[[Path, str, str, Mapping[str, Any]], Seen]] = {
    "transformers": plain,
    "sentence-transformers": sentence_transformers,
    "vllm": vllm,
}


def installed(tool: str) -> bool:
    """Whether a tool of `OTHERS` can be imported; nothing is imported to find out."""
    return importlib.util.find_spec(tool.replace("-", "_")) is not None


def _run(embed: Callable[[Group], Tensor], prepare: Callable[[Group], Any]) -> Seen:
    """Embeddings by whole groups, what is fed item by item."""
    seen = Seen()
    for group in groups():
        seen.embeddings[group.name] = embed(group).cpu()
        for name, item in zip(group.ids, group.items, strict=True):
            made = prepare(Group(name, (item,), group.instruction))
            seen.fed[name] = Fed.of(made["input_ids"][0], made.get(PIXELS))
    return seen


def _bare(item: dict[str, Any]) -> Any:
    """A sample as users of sentence-transformers give it: text or picture alone stand without a dict."""
    return item if len(item) > 1 else next(iter(item.values()))


def _conversations(group: Group) -> list[list[dict[str, Any]]]:
    """Each item as messages: the instruction in a system message, text and picture in a user message."""
    system = [{"role": "system", "content": [{"type": "text", "text": group.instruction}]}] if group.instruction else []
    users = [[{"type": kind, kind: value} for kind, value in item.items()] for item in group.items]
    return [[*system, {"role": "user", "content": content}] for content in users]


@contextmanager
def _quiet() -> Any:
    """Keep transformers from reporting that an embedding needs no language head."""
    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    finally:
        transformers.utils.logging.set_verbosity(said)
