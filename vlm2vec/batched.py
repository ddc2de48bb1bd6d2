"""`EncodeBatch`: a model as a function from columns to columns, for tools that bring their own cluster (`datasets`, Ray Data)."""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlm2vec.data.types import ImageRef
from vlm2vec.encoder import Encoder
from vlm2vec.errors import InputError

Column = Iterable[Any]

IMPORTED_BY = os.getpid()


class EncodeBatch:
    """Adds a column of embeddings to a batch of columns: `dataset.map(EncodeBatch(model), batched=True)`, `map_batches(EncodeBatch)`.

    `text`, `image` and `instruction_column` name columns to read, those that are there; `instruction` is for rows that bring none, `role`
    "query" or "target" takes the one the model was saved with. A picture is a path, bytes, a struct of both, a PIL image, an (H, W, 3)
    array, or a list of those. `options` are those of `Encoder.from_pretrained`.

    The object is small and picklable: the model is loaded once per process, at the first batch, and never travels.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        text: str = "text",
        image: str = "image",
        instruction_column: str = "instruction",
        output: str = "embedding",
        instruction: str = "",
        role: str | None = None,
        autocast: str = "fp32",
        chunk_tokens: int = 32768,
        **options: Any,
    ) -> None:
        if role not in (None, "query", "target"):
            raise InputError(f"role: expected query or target, got {role!r}")
        self.model = str(model)
        self.columns = {"text": text, "image": image, "instruction": instruction_column}
        self.output, self.instruction, self.role = output, instruction, role
        self.autocast, self.chunk_tokens, self.options = autocast, chunk_tokens, options
        self._encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def __call__(self, batch: MutableMapping[str, Any], rank: int | None = None) -> MutableMapping[str, Any]:
        """The batch with the column `output`, (N, D) float32. `rank` (`with_rank=True`) chooses among several GPUs.

        Raises InputError where neither column is there or a row has neither text nor image, ImageError for a picture that is broken.
        """
        present = {key: name for key, name in self.columns.items() if name in batch}
        if not present.keys() & {"text", "image"}:
            wanted = f"{self.columns['text']!r} nor {self.columns['image']!r}"
            raise InputError(f"the batch has neither a column {wanted}; it has {', '.join(map(str, batch)) or 'none'}")
        columns = [[_plain(key, value) for value in batch[name]] for key, name in present.items()]
        items = [dict(zip(present, values, strict=True)) for values in zip(*columns, strict=True)]
        batch[self.output] = self._embed(items, rank)
        return batch

    def _embed(self, items: list[dict[str, Any]], rank: int | None) -> NDArray[np.float32]:
        if self._encoder is None:
            if os.getpid() != IMPORTED_BY:
                # A forked worker (`num_proc`) has the thread pool of its parent, but not the threads, and would wait for them.
                torch.set_num_threads(1)
            self._encoder = Encoder.from_pretrained(self.model, **{"device": _device(rank), **self.options})
            self._encoder.precision = self.autocast
        saved = {"query": self._encoder.query_instruction, "target": self._encoder.target_instruction}
        instruction = self.instruction or saved.get(self.role or "", "")
        return self._encoder.encode(items, instruction=instruction, chunk_tokens=self.chunk_tokens).numpy()


def _device(rank: int | None) -> str | None:
    """One GPU after the other for the processes of a pool; None leaves the choice to the encoder."""
    if rank is None or not torch.cuda.is_available():
        return None
    return f"cuda:{rank % torch.cuda.device_count()}"


def _plain(key: str, value: Any) -> Any:
    """A cell in the form that `Encoder.encode` takes."""
    if key != "image":
        return None if value is None else str(value)
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_picture(each) for each in value if each is not None]
    return _picture(value)


def _picture(value: Any) -> Any:
    if isinstance(value, dict):
        label = value.get("path") or "image"
        if value.get("bytes"):
            return ImageRef(value["bytes"], f"image {label!r}")
        return value.get("path")
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, np.str_ | str):
        return str(value) or None
    return value
