"""Checkpoints made on the spot: byte-level tokenizers and random weights, for the miniatures and the models trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

VLM = "AutoModelForImageTextToText"
CHAT = (  # turns between two control tokens; PICTURE is what stands for a picture
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    named: dict[str, str], plain: Sequence[str] = (), words: Iterable[str] = (), size: int = 256, frame: str = ""
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: 256 bytes, merges learned from `words` up to `size` ids, then the special tokens.

    `named` maps a role such as `pad_token` or `image_token` to its token; `plain` are further special tokens. `frame` is a template such as
    "[CLS] $A [SEP]" that a text is put into. Equal arguments give equal tokenizers.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if size > len(alphabet):
        tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    tokens = [*named.values(), *plain]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    if frame:
        used = [(token, tokenizer.token_to_id(token)) for token in tokens if token in frame.split()]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    roles = {role: token for role, token in named.items() if role in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES}
    extra = {role: token for role, token in named.items() if role not in roles}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, extra_special_tokens=extra)


def sizes(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """The four sizes of a transformer under the names of its configuration."""
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}


def small(layers: int = 2, heads: int = 4, **others: Any) -> dict[str, Any]:
    """The sizes of a transformer in a miniature, under the names of its configuration."""
    return {**sizes(32, 64, layers, heads), "initializer_range": 0.2, **others}


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of padding, beginning and end of text under the names of a text configuration."""
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}


def new_model(config: Any, seed: int = 0, auto_class: str = VLM) -> Any:
    """A randomly initialised model of `config`; leaves the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, auto_class).from_config(config)


def write_checkpoint(
    to: Path,
    config: Any,
    tokenizer: Any,
    image_processor: Any,
    seed: int = 0,
    auto_class: str = VLM,
    wake: float = 0.0,
    processor: dict[str, Any] | None = None,
) -> Path:
    """Write a randomly initialised model of `config` with its tokenizer and image processor, and `processor_config.json` for transformers'
    own processor, `processor` being what that needs to know beside its class.

    `wake` fills tensors that a new model leaves at zero with normal noise of that spread: a gate at zero would hide what lies behind it.
    """
    model = new_model(config, seed, auto_class)
    if wake:
        stream = torch.Generator().manual_seed(seed)
        for tensor in (parameter.data for parameter in model.parameters() if not parameter.any()):
            tensor.copy_(wake * torch.randn(tensor.shape, generator=stream))
    for piece in (model, tokenizer, image_processor):
        piece.save_pretrained(str(to))
    if kind := PROCESSOR_MAPPING_NAMES.get(config.model_type):
        settings = {"processor_class": kind, **(processor or {})}
        (to / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return to
