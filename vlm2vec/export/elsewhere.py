"""What other libraries can and cannot do with an encoder: said in the export and held to, so that none gives a wrong number quietly."""

from __future__ import annotations

from collections.abc import Iterator

from vlm2vec.encoder import Encoder


def differences(encoder: Encoder) -> list[str]:
    """Why transformers' own classes would not give the embeddings of this encoder; empty where they do.

    sentence-transformers then runs our code, and transformers alone is not to be used; nor is vLLM, which was never tried on these.
    """
    return list(_differences(encoder))


def _differences(encoder: Encoder) -> Iterator[str]:
    if encoder.backbone.differs_elsewhere:
        yield encoder.backbone.differs_elsewhere
    if encoder.options.positions == "flat":
        yield "model.positions is flat: tokens count through pictures, which no configuration of transformers says"
    if encoder.processor.edge_after_resize:
        yield f"model.resize squashes pictures to {encoder.processor.edge_after_resize} pixels first, as no processor of transformers does"


def notes(encoder: Encoder) -> list[str]:
    """What holds in this library alone, where the same classes give the same embeddings otherwise."""
    return list(_notes(encoder))


def _notes(encoder: Encoder) -> Iterator[str]:
    yield f"Texts are cut to {encoder.options.max_tokens} tokens by vlm2vec alone; elsewhere longer ones stay longer."
    yield "Give pictures in RGB and upright: vlm2vec turns them as their EXIF says and lays transparent ones on white, others do not."
    if encoder.options.decode == "draft":
        yield "vlm2vec decodes large JPEG pictures at a part of their size (decode: draft); elsewhere they are decoded in full."
    if not encoder.backbone.guarded_elsewhere:
        yield "A control token in a user's text is read as one outside vlm2vec: take them out of texts that you do not trust."
