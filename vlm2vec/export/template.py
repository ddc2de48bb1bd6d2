"""Our prompt rules as a chat template, so that tools that know templates alone give an item the same token ids.

sentence-transformers writes an item as messages: its `prompt` is a system message, its text and pictures are a user message. The template
makes of these what `prompts.render` and the family's processor make of an item. `raw.jinja` and `chat.jinja` are the two kinds of
`model.prompt`; `collect.jinja` is what they share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm2vec.backbones.base import Processor
from vlm2vec.backbones.chat import RAW, SLOT, ChatTemplate
from vlm2vec.errors import ModelError

HERE = Path(__file__).parent
BETWEEN = "\ue002"  # stands for a picture while newlines around the texts of a chat are taken off; a letter for private use


def chat_template(processor: Processor) -> str:
    """The template in Jinja. Raises ModelError for a chat whose turns are not plain texts one behind the other."""
    kind = "chat" if processor.chat else "raw"
    constants = _chat(processor, processor.chat) if processor.chat else _raw(processor)
    constants |= {"chat": bool(processor.chat), "keep_stray": processor.options.keep_stray}
    stated = [f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in constants.items()]
    return "".join([*stated, (HERE / "collect.jinja").read_text("utf-8"), (HERE / f"{kind}.jinja").read_text("utf-8")])


def picture_mark(processor: Processor) -> str:
    """What stands for a picture before transformers' processor expands it."""
    return processor.chat_mark or processor.image_token


def _raw(processor: Processor) -> dict[str, Any]:
    return {"slot": picture_mark(processor), "opening": _tokens(processor, processor.prefix)}


def _tokens(processor: Processor, ids: list[int]) -> str:
    return "".join(processor.tokenizer.convert_ids_to_tokens(ids))


def _chat(processor: Processor, chat: ChatTemplate) -> dict[str, Any]:
    """The format around texts and pictures, read off the checkpoint's template and tried on an item with all of them."""
    first, second, third = (SLOT.format(number) for number in range(3))
    opening, _, closing = chat.render(False, False).partition(first)
    system_opening, _, rest = chat.render(True, False).partition(first)
    system_closing = rest.partition(second)[0]
    picture = chat.render(False, True).removeprefix(opening).removesuffix(closing)
    whole = f"{system_opening}{first}{system_closing}{picture}{second}{picture}{third}{closing}"
    if chat.render(True, True, False, True, False) != whole:
        raise ModelError(f"the model's chat template does more than set texts and pictures apart, which an export cannot repeat; {RAW}")
    start = _tokens(processor, processor.prefix)
    return {
        "opening": start + opening.removeprefix(start),
        "system_opening": start + system_opening.removeprefix(start),
        "system_closing": system_closing,
        "default_system": processor.options.system or "",
        "picture": picture,
        "closing": closing,
        "ending": chat.ending,
        "slot": BETWEEN,
    }
