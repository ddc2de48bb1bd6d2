"""Features of pictures on disk: what comes back, what misses, what is said when a shard is damaged or gone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm2vec.batch import featurize
from vlm2vec.config import ModelConfig
from vlm2vec.data import images
from vlm2vec.data.images import content_key
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.encoder import Encoder
from vlm2vec.errors import EnvError, ImageError
from vlm2vec.feature_cache import LISTED, FeatureCache, size_of


def picture(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    vectors = torch.randn(3 + seed, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {"vectors": vectors, "grid": torch.tensor([[1, seed, 2]])}


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def files(tmp_path: Path) -> list[ImageRef]:
    refs = [ImageRef(tmp_path / f"{number}.png") for number in range(4)]
    for number, ref in enumerate(refs):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(ref.source)
    return refs


def filled(folder: Path, refs: list[ImageRef], model: str = "m") -> FeatureCache:
    """Two shards of two pictures, all of them chosen."""
    cache = FeatureCache(folder, model)
    for start in range(0, len(refs), 2):
        cache.put({content_key(ref): picture(start + number) for number, ref in enumerate(refs[start : start + 2])})
    cache.keep(map(content_key, refs))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_come_back_bit_for_bit_in_a_later_process(tmp_path: Path, files: list[ImageRef], dtype: torch.dtype) -> None:
    FeatureCache(tmp_path, "m").put({content_key(ref): picture(number, dtype) for number, ref in enumerate(files)})
    again = FeatureCache(tmp_path, "m")
    again.keep(map(content_key, files))
    assert all(same(again.known(ref), picture(number, dtype)) for number, ref in enumerate(files))


def test_only_chosen_pictures_are_found(tmp_path: Path, files: list[ImageRef]) -> None:
    cache = filled(tmp_path, files)
    cache.keep([content_key(files[1])])
    assert [cache.known(ref) is None for ref in files] == [True, False, True, True]


def test_another_content_under_the_same_name_misses_and_a_copy_under_another_hits(tmp_path: Path, files: list[ImageRef]) -> None:
    cache = filled(tmp_path, files)
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[0].source.read_bytes())
    files[0].source.write_bytes(files[2].source.read_bytes())
    assert same(cache.known(ImageRef(copy)), picture(0)) and same(cache.known(files[0]), picture(2))
    Image.new("RGB", (28, 28), "white").save(files[0].source)
    assert cache.known(files[0]) is None


def test_another_model_misses(tmp_path: Path, files: list[ImageRef]) -> None:
    filled(tmp_path, files)
    assert FeatureCache(tmp_path, "other").missing(["k"]) == ["k"] and not FeatureCache(tmp_path, "other").sizes


def test_a_file_that_is_gone_is_the_error_of_decoding(tmp_path: Path, files: list[ImageRef]) -> None:
    cache = filled(tmp_path, files)
    files[0].source.unlink()
    with pytest.raises(ImageError) as cached:
        cache.known(files[0])
    with pytest.raises(ImageError) as decoded:
        images.load_image(files[0])
    assert str(cached.value) == str(decoded.value)


def test_a_damaged_shard_is_named_and_its_pictures_are_missing(
    tmp_path: Path, files: list[ImageRef], caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, files)
    bad = sorted(tmp_path.rglob("*.safetensors"))[0]
    data = bytearray(bad.read_bytes())
    data[-3] ^= 1
    bad.write_bytes(data)
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        cache = FeatureCache(tmp_path, "m")
    assert [str(bad) in record.message for record in caplog.records] == [True]
    assert cache.missing(list(map(content_key, files))) == list(map(content_key, files[:2]))


def test_a_shard_that_vanishes_in_use_ends_the_run_with_advice(tmp_path: Path, files: list[ImageRef]) -> None:
    cache = filled(tmp_path, files)
    gone = sorted(tmp_path.rglob("*.safetensors"))[1]
    gone.unlink()
    assert cache.known(files[0])
    with pytest.raises(EnvError, match=f"{gone.name}.*run the same command"):
        cache.known(files[2])


def test_a_picture_takes_no_more_disk_than_it_is_counted(tmp_path: Path, files: list[ImageRef]) -> None:
    for number, ref in enumerate(files):  # one picture per shard: the largest share of headers
        FeatureCache(tmp_path / "cache", "m").put({content_key(ref): picture(number)})
    counted = sum(FeatureCache(tmp_path / "cache", "m").sizes.values())
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.*"))
    assert sum(size_of(picture(number)) for number in range(4)) == counted
    assert counted - 4 * LISTED < on_disk <= counted


def test_a_cached_picture_is_not_decoded(tmp_path: Path, files: list[ImageRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and everything else but pixels stay as they are."""
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu")
    item = Item("<|image_1|>\nwhat\n", (files[1],))
    plain = featurize(encoder.processor, item)
    cache = FeatureCache(tmp_path, encoder.towers_fingerprint())
    cache.put({content_key(files[1]): encoder.picture_features(plain.images[0])})
    cache.keep([content_key(files[1])])
    monkeypatch.setattr("vlm2vec.batch.load_image", lambda ref, **options: pytest.fail("decoded"))
    cached = featurize(encoder.processor, item, cache)
    assert torch.equal(cached.input_ids, plain.input_ids) and cached.images[0].keys() == {"vectors", "image_grid_thw"}


# -- what features depend on beside the picture


def test_the_fingerprint_of_towers_follows_what_features_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(change: str = "") -> str:
        options = {"max_pixels": 3136} if change == "processor" else {"attention": "eager"} if change == "attention" else {}
        encoder = Encoder.build(ModelConfig(path="builtin/tiny-qwen2_vl", **options))
        parameters = dict(encoder.model.named_parameters())
        if change in ("vision", "projector", "language"):
            part = next(name for name in parameters if encoder.backbone.part_of(name) == change)
            parameters[part].data.view(-1)[0] += 1
        if change == "precision":
            encoder.precision = "bf16"
        if change == "decoder":
            monkeypatch.setattr(images, "DECODE_VERSION", images.DECODE_VERSION + 1)
        return encoder.towers_fingerprint()

    changes = ("vision", "projector", "processor", "attention", "precision", "decoder")
    assert fingerprint("language") == fingerprint()
    assert len({fingerprint(), *map(fingerprint, changes)}) == 1 + len(changes)
