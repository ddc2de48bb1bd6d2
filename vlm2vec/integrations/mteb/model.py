"""An `Encoder` as a model of mteb: MTEB, MIEB, ViDoRe and every other of its benchmarks of texts and pictures.

Shape letters: Q queries, N targets, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader

from vlm2vec import log
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.encoder import Encoder, as_item
from vlm2vec.errors import InputError
from vlm2vec.quantize import exact
from vlm2vec.ranking import QUERIES_AT_ONCE, similarity
from vlm2vec.results import model_name

PROMPT = "vlm2vec_prompt"  # column of our own tasks: the whole prompt, which takes the place of text and instruction
WINDOW = 512  # items encoded at once: the company they keep may move an embedding by 1e-7
BLANK = "\n"  # what an empty text is embedded as; some corpora of mteb have such


class MtebModel(AbsEncoder):
    """Gives mteb the embeddings that `encoder.encode` gives, and scores them exactly, so that equal embeddings tie.

    The instruction of an item is the first of these that is there; an empty text of the first kind means none:
        1. `instructions`, by mteb's own keys, the most special first: "<task>-query" or "<task>-document", "<task>", "<type>-query" or
           "<type>-document", "<type>", "query" or "document". Tasks without sides (classification, STS) count as queries.
        2. The one that the model was saved with, `query_instruction` or `target_instruction`.
        3. The prompt of mteb's task; a task that has one text for both sides means it for queries.
    It stands between picture and text, as in MMEB (`prompts.render`). Rows of `SuiteTask` bring their whole prompt and get none.

    `name` ("owner/model") and `revision` are what mteb files results under; by default where the model came from, and its fingerprint.
    Batches are made by `chunk_tokens`, in `workers` processes; mteb's `batch_size` changes nothing.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        instructions: Mapping[str, str] | None = None,
        name: str | None = None,
        revision: str | None = None,
        chunk_tokens: int = 32768,
        workers: int = 0,
    ) -> None:
        self.model = encoder
        self.instructions = dict(instructions or {})
        self.chunk_tokens, self.workers = chunk_tokens, workers
        self.mteb_model_meta = describe(encoder, name, revision)

    def instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """What the items of one side of a task are asked for."""
        document = prompt_type == PromptType.document
        side = PromptType.document if document else PromptType.query
        key = get_prompt_name(self.instructions, task_metadata, side)
        if key is not None:
            return self.instructions[key]
        own = self.model.target_instruction if document else self.model.query_instruction
        return own or _task_prompt(task_metadata, side)

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Embed what `inputs` loads (N) -> (N, D) unit rows, in its order: texts, pictures, or both in one item.

        Raises InputError for `precision` (that is for other models), ImageError for a picture that is broken, NonFiniteError as `encode`.
        """
        if kwargs.get("precision") is not None:
            raise InputError(f"precision: {kwargs['precision']!r} was asked for, our embeddings are float32; leave it out")
        source: Any = inputs.dataset
        complete = PROMPT in getattr(source, "column_names", ())
        instruction = "" if complete else self.instruction(task_metadata, prompt_type)
        rows = [np.zeros((0, self.model.backbone.hidden_size), dtype=np.float32)]
        shown = kwargs.get("show_progress_bar", True)
        with log.progress(len(source), task_metadata.name, "item", enabled=None if shown else False) as bar:
            for window in _windows(_undecoded(inputs), instruction):
                rows.append(self.model.encode(window, chunk_tokens=self.chunk_tokens, workers=self.workers).numpy())
                bar.update(len(window))
        return np.concatenate(rows)

    def similarity(self, embeddings1: ArrayLike, embeddings2: ArrayLike) -> torch.Tensor:
        """Cosine similarity (Q, N) of unit rows, rounded to float32 once from an exact sum: what the harness ranks by."""
        query, target = (exact(np.atleast_2d(np.asarray(rows))) for rows in (embeddings1, embeddings2))
        blocks = [query[start : start + QUERIES_AT_ONCE] for start in range(0, len(query), QUERIES_AT_ONCE)]
        return torch.from_numpy(np.concatenate([similarity(block, target) for block in blocks]))


def _task_prompt(metadata: TaskMetadata, side: PromptType) -> str:
    if isinstance(metadata.prompt, dict):
        return metadata.prompt.get(side.value, "")
    return "" if side == PromptType.document else metadata.prompt or get_abstask_prompt(metadata.name)


# -- from batches to items ---------------------------------------------------------------------------------------------------------------


def _undecoded(inputs: DataLoader) -> DataLoader:
    """The same batches with pictures as they are stored, so that our own reader decodes them, in its workers."""
    rows = inputs.dataset
    if not isinstance(rows, datasets.Dataset) or not isinstance(rows.features.get("image"), datasets.Image):
        return inputs
    stored = rows.cast_column("image", datasets.Image(decode=False))
    return DataLoader(stored, batch_size=inputs.batch_size, collate_fn=inputs.collate_fn)


def _windows(batches: DataLoader, instruction: str) -> Iterator[list[Item]]:
    """Consecutive items, WINDOW at once; pictures that mteb decoded are held no longer than that."""
    items = (item for batch in batches for item in _items(batch, instruction))
    while window := list(islice(items, WINDOW)):
        yield window


def _items(batch: Mapping[str, Sequence[Any]], instruction: str) -> list[Item]:
    texts, images = batch.get(PROMPT, batch.get("text")), batch.get("image")
    if texts is None and images is None:
        raise InputError(f"the batch has neither text nor image, its columns are {', '.join(batch)}; other kinds cannot be embedded")
    pairs = zip_longest(texts or [], images or [])  # of two columns each is whole or not there
    return [_item(text, image, instruction) for text, image in pairs]


def _item(text: str | None, image: Any, instruction: str) -> Item:
    pictures = [_picture(one) for one in (image if isinstance(image, list | tuple) else [image]) if one is not None]
    if not pictures and not (text or "").strip():
        return Item(BLANK, instruction=instruction)
    return as_item({"text": text, "image": pictures}, instruction)


def _picture(stored: Any) -> Any:
    """What `as_item` takes: the encoded bytes or the file of a stored picture. Others, such as open PIL images, are left as they are."""
    if not isinstance(stored, dict):
        return stored
    if stored["bytes"] is not None:
        return ImageRef(stored["bytes"], f"image {stored['path'] or ''!r}")
    return Path(stored["path"])


# -- what mteb is told -------------------------------------------------------------------------------------------------------------------


def describe(encoder: Encoder, name: str | None = None, revision: str | None = None) -> ModelMeta:
    """What is known about a model; what is not (licence, languages, training data, ...) is None. InputError for a name without "/"."""
    if name is not None and "/" not in name:
        raise InputError(f"name: mteb wants owner/model, got {name!r}")
    parameters = list(encoder.model.parameters())
    return ModelMeta(
        loader=None,
        name=name or _public_name(encoder.source),
        revision=revision or encoder.fingerprint(),
        release_date=None,
        languages=None,
        n_parameters=sum(tensor.numel() for tensor in parameters),
        memory_usage_mb=round(sum(tensor.numel() * tensor.element_size() for tensor in parameters) / 2**20, 1),
        max_tokens=encoder.options.max_tokens,
        embed_dim=encoder.backbone.hidden_size,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
        adapted_from=_public_name(encoder.options.path) if encoder.adapter is not None else None,
        modalities=["text", "image"],
    )


def _public_name(source: str) -> str:
    """A name on the Hub as it is; the name of a folder without its place on this machine."""
    return source if source.count("/") == 1 and not Path(source).exists() else f"local/{model_name(source)}"
