"""Our encoder as a module of sentence-transformers, for models whose embeddings that library's own modules would not give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers.base.modules import InputModule
from torch import Tensor

from vlm2vec.batch import featurize
from vlm2vec.encoder import Encoder, as_item


class Vlm2Vec(InputModule):
    """Prompt, model, pooling and normalisation in one module; an input is what `Encoder.encode` takes."""

    modalities = ["text", "image", ("image", "text"), "message"]  # without the last, which `as_item` refuses, kinds could not share a batch

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.backbone = encoder.backbone  # where torch looks for parameters

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The checkpoint's tokenizer; prompts are made by `preprocess`."""
        return self.encoder.processor.tokenizer

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """A padded batch; `prompt` is the instruction of items that bring none."""
        processor = self.encoder.processor
        return processor.collate([featurize(processor, as_item(item, prompt or "")) for item in inputs])

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (N, D), unit rows."""
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        return {**features, "sentence_embedding": self.encoder.embed(tensors)}

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.encoder.backbone.hidden_size

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, revision: str | None = None, **kwargs: Any) -> Vlm2Vec:
        """The encoder in a folder or on the Hub, in float32; what else sentence-transformers passes is not needed."""
        return cls(Encoder.from_pretrained(model_name_or_path, revision=revision, device="cpu"))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the encoder; sentence-transformers writes its own files beside it."""
        self.encoder.save_pretrained(output_path)
