"""A checkpoint's own chat template around an item, so that no word of the item can become part of the format.

The template is rendered with a mark in the place of every text and picture, never with the texts themselves. What it wrote around the
marks is the format: its control tokens are inserted by id, and the item's words are tokenized with control tokens switched off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from vlm2vec.backbones.runs import Part, Text
from vlm2vec.errors import ModelError

SLOT = "\ue000{}\ue001"  # stands for text number {} while the template is rendered; both letters are for private use
RAW = "use model.prompt: raw"


Layout = list[tuple[str, str]]  # (what, which) of "text", "picture", "token" and "format"


class ChatTemplate:
    """The chat format of a tokenizer: one optional system turn, one user turn, and the start of the answer with `ending` after it.

    `mark` is what the template writes for a picture. A template is asked for `bare` turns: those that we export would else add by
    themselves what is added here.
    """

    def __init__(self, tokenizer: Any, template: str, mark: str, ending: str) -> None:
        self.tokenizer, self.template, self.mark, self.ending = tokenizer, template, mark, ending
        self._layouts: dict[tuple[bool, ...], Layout] = {}

    def parts(self, system: str, content: Sequence[str | int]) -> list[Part]:
        """The prompt of an item: `content` is its texts and pictures in order. Raises ModelError if the template leaves any of it out."""
        texts = [system] * bool(system) + [piece for piece in content if isinstance(piece, str)]
        pictures = iter([piece for piece in content if isinstance(piece, int)])
        shape = (bool(system), *(isinstance(piece, int) for piece in content))
        if shape not in self._layouts:
            self._layouts[shape] = list(self._parse(self.render(*shape) + self.ending))
        parts: list[Part] = []
        for what, which in self._layouts[shape]:
            if what == "text":
                parts.append(Text(texts[int(which)]))
            elif what == "picture":
                parts.append(next(pictures))
            elif what == "token":
                parts.append((int(self.tokenizer.convert_tokens_to_ids(which)),))
            else:
                parts.append(Text(which, own=False))
        return parts

    def render(self, has_system: bool, *is_picture: bool) -> str:
        """The template's string for a system turn, if any, and a user turn of texts and pictures."""
        slots = iter(range(has_system, len(is_picture) + 1))
        content = [{"type": "image"} if picture else {"type": "text", "text": SLOT.format(next(slots))} for picture in is_picture]
        forms: list[Any] = [SLOT.format(0), [{"type": "text", "text": SLOT.format(0)}]]  # templates differ in what a system turn holds
        expected = [1] * (has_system + is_picture.count(False))
        for form in forms if has_system else forms[:1]:
            messages = [{"role": "system", "content": form}] * has_system + [{"role": "user", "content": content}]
            try:
                rendered = self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, bare=True
                )
            except (TemplateError, TypeError) as error:
                raise ModelError(f"the model's chat template refuses a prompt ({error}); {RAW}") from error
            found = [rendered.count(SLOT.format(number)) for number in range(len(expected))]
            if found == expected and rendered.count(self.mark) == is_picture.count(True) and "'type':" not in rendered:
                return rendered
        raise ModelError(f"the model's chat template leaves out a text or a picture of the prompt; {RAW}")

    def _parse(self, rendered: str) -> Iterator[tuple[str, str]]:
        tokens = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        marks = [SLOT.format(r"(?P<text>\d+)"), f"(?P<picture>{re.escape(self.mark)})", f"(?P<token>{'|'.join(map(re.escape, tokens))})"]
        start = 0
        for found in re.finditer("|".join(marks), rendered):
            if found.start() > start:
                yield "format", rendered[start : found.start()]
            yield str(found.lastgroup), found[str(found.lastgroup)]
            start = found.end()
        if rendered[start:]:
            yield "format", rendered[start:]
