"""Vision-language models as embedding models. `from vlm2vec import Encoder, Item` is where most users start.

Names are imported on first use, so that `import vlm2vec` stays quick and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm2vec.batched import EncodeBatch as EncodeBatch
    from vlm2vec.bulk import encode_corpus as encode_corpus
    from vlm2vec.config import Recipe as Recipe
    from vlm2vec.config import load_recipe as load_recipe
    from vlm2vec.data.types import ImageRef as ImageRef
    from vlm2vec.data.types import Item as Item
    from vlm2vec.data.types import Pair as Pair
    from vlm2vec.encoder import Encoder as Encoder
    from vlm2vec.errors import Vlm2VecError as Vlm2VecError
    from vlm2vec.vectors import iterate_vectors as iterate_vectors
    from vlm2vec.vectors import read_vectors as read_vectors

__version__ = "0.1.0"

_HOMES = {
    "EncodeBatch": "vlm2vec.batched",
    "Encoder": "vlm2vec.encoder",
    "ImageRef": "vlm2vec.data.types",
    "Item": "vlm2vec.data.types",
    "Pair": "vlm2vec.data.types",
    "Recipe": "vlm2vec.config",
    "Vlm2VecError": "vlm2vec.errors",
    "encode_corpus": "vlm2vec.bulk",
    "iterate_vectors": "vlm2vec.vectors",
    "load_recipe": "vlm2vec.config",
    "read_vectors": "vlm2vec.vectors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlm2vec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
