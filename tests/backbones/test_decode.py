"""`model.decode: draft` in every family: what is needed is what pictures are scaled to; features keep shapes and nearly their values."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from tests.backbones.common import embed
from tests.sights import SIGHTS
from vlm2vec.backbones import registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.batch import featurize
from vlm2vec.data.images import SPARE
from vlm2vec.data.types import ImageRef, Item

INFERRED = {"llava"}  # its image processor can be any, so that every pixel is taken to be needed
ALL = sorted(registry())
SIZES = [(640, 480), (480, 640), (800, 200), (160, 960), (512, 512)]


@pytest.mark.parametrize("model_type", ALL)
def test_what_is_needed_is_what_the_family_scales_to(
    model_type: str, tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at Pillow's own resize: nothing is made larger, and the longest side is as long. A portrait may be scaled lying."""
    processor, resize = tiny(model_type).processor, Image.Image.resize
    made: list[tuple[int, int]] = []

    def noted(image: Image.Image, size: tuple[int, int], *given: object, **options: object) -> Image.Image:
        made.append((int(size[0]), int(size[1])))
        return resize(image, size, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", noted)
    for size in SIZES:
        made.clear()
        processor.image_inputs(Image.new("RGB", size, "red"))
        needed = processor.needed_size(*size)
        if model_type in INFERRED:
            assert needed == size
        else:
            assert max(map(max, made)) == max(needed) and max(map(min, made)) <= min(needed), (size, needed, made)


@pytest.mark.parametrize("model_type", ALL)
def test_no_scale_that_may_be_taken_changes_the_number_of_tokens(model_type: str, tiny: Callable[..., Backbone]) -> None:
    processor, taken = tiny(model_type).processor, 0
    for width, height in (np.random.default_rng(0).integers(4, 140, (200, 2)) * 8).tolist():
        target = processor.needed_size(width, height)
        for scale in (2, 4, 8):
            reduced = (width // scale, height // scale)
            spare = reduced[0] >= SPARE * target[0] and reduced[1] >= SPARE * target[1]
            if spare and processor.needed_size(*reduced) == target:
                taken += 1
                assert processor.count_image_tokens(*reduced) == processor.count_image_tokens(width, height)
    assert taken > 50 or model_type in INFERRED


@pytest.mark.parametrize("resize", [None, 64])
@pytest.mark.parametrize("model_type", ALL)
def test_embeddings_stay_close_and_are_told_apart(model_type: str, resize: int | None, tiny: Callable[..., Backbone]) -> None:
    exact, draft = (tiny(model_type, decode=decode, resize=resize) for decode in ("exact", "draft"))
    assert exact.processor.fingerprint != draft.processor.fingerprint
    for kind in ("photo", "text"):
        buffer = io.BytesIO()
        SIGHTS[kind](1024, 768).save(buffer, "JPEG", quality=90)
        item = Item(images=(ImageRef(buffer.getvalue()),))
        whole, reduced = (featurize(backbone.processor, item) for backbone in (exact, draft))
        assert torch.equal(whole.input_ids, reduced.input_ids)
        same = [torch.equal(value, reduced.images[0][name]) for name, value in whole.images[0].items()]
        assert all(same) == (model_type in INFERRED and resize is None)
        assert all(value.shape == reduced.images[0][name].shape for name, value in whole.images[0].items())
        assert (embed(exact, [whole]) @ embed(exact, [reduced]).T).item() > 0.99
