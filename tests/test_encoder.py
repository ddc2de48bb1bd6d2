"""`Encoder`: what goes in, what comes out, and that nothing but the item decides it."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm2vec import Encoder, batch
from vlm2vec.backbones import registry
from vlm2vec.config import LoraConfig, ModelConfig
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.encoder import _blocks
from vlm2vec.errors import ImageError, InputError, ModelError

FAMILIES = sorted(registry())


def picture(red: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = Image.new("RGB", size, (red, 120, 30))
    image.paste((20, red, 200), (5, 5, 15, 25))
    return image


def items() -> list:
    """Text only, picture only, both, two pictures, short and long: what a real batch mixes."""
    return [
        "a short text",
        {"text": "a much longer text that goes on and on so that its row needs more tokens than all the others " * 2},
        picture(200),
        {"text": "what is this", "image": picture(100, (64, 64)), "instruction": "Answer the question:"},
        {"text": "compare", "image": [picture(10), picture(250, (30, 60))]},
        "another text",
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_item_alone_equals_the_item_in_any_batch(family: str, side: str) -> None:
    encoder = Encoder.from_pretrained(f"builtin/tiny-{family}", padding_side=side)
    alone = torch.cat([encoder.encode([item]) for item in items()])
    together = encoder.encode(items(), chunk_tokens=10**6)
    assert alone.shape == (6, encoder.backbone.hidden_size) and alone.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.encode(items(), chunk_tokens=300), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(6), atol=1e-6, rtol=0)
    assert (alone @ alone.T - torch.eye(6)).max() < 1 - 1e-4, "different items must have different embeddings"


def test_both_padding_sides_give_the_same_embeddings() -> None:
    left, right = (Encoder.from_pretrained("builtin/tiny-qwen2_vl", padding_side=side).encode(items()) for side in ("left", "right"))
    torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_packed_chunks_give_the_same_embeddings_under_another_fingerprint() -> None:
    padded, packed = (Encoder.from_pretrained("builtin/tiny-qwen2_vl", attention=attention) for attention in ("sdpa", "packed"))
    expected = padded.encode(items())
    torch.testing.assert_close(packed.encode(items(), chunk_tokens=10**6), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed.encode(items(), chunk_tokens=300), expected, atol=1e-6, rtol=0)
    assert packed.fingerprint() != padded.fingerprint()


def test_order_and_repeats_are_kept_and_workers_change_nothing() -> None:
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    rows = encoder.encode(items())
    mixed = [items()[index] for index in (3, 0, 3, 5, 0)]
    torch.testing.assert_close(encoder.encode(mixed), rows[[3, 0, 3, 5, 0]], atol=1e-6, rtol=0)
    assert torch.equal(encoder.encode(items(), workers=2), rows)
    assert encoder.encode([]).shape == (0, encoder.backbone.hidden_size)


def test_a_picture_may_be_a_path_bytes_or_an_open_image(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    buffer = io.BytesIO()
    picture(90).save(buffer, "PNG")
    file = tmp_path / "a picture.png"
    file.write_bytes(buffer.getvalue())
    forms = [picture(90), {"image": picture(90)}, {"image": str(file)}, {"image": file}, {"image": buffer.getvalue()}, {"image": [file]}]
    rows = encoder.encode(forms)
    assert torch.equal(rows, rows[:1].expand_as(rows))


def test_instructions_fill_in_where_an_item_has_none() -> None:
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    encoder.query_instruction = "Find it:"
    asked = encoder.encode([{"text": "a dog", "instruction": "Find it:"}])
    assert torch.equal(encoder.encode_query(["a dog"]), asked)
    assert torch.equal(encoder.encode_target(["a dog"]), encoder.encode(["a dog"]))
    assert torch.equal(encoder.encode_query([{"text": "a dog", "instruction": "Find it:"}]), asked)
    assert encoder.similarity(asked, asked).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["a", {"txet": "b"}], "unknown key 'txet'"),
        ([{"text": " "}], "neither text nor image"),
        ([3], "cannot embed a int"),
        ([{"image": 3}], "image must be a path, bytes or a PIL image, got int"),
        ("a plain string", "list of items"),
        ([{"image": "/no/such/file.png"}], "/no/such/file.png"),
    ],
)
def test_what_is_not_an_item_is_refused_in_words(bad: list, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Encoder.from_pretrained("builtin/tiny-qwen2_vl").encode(bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(f"builtin/tiny-{family}", pooling="mean", max_tokens=33)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert (again.options.pooling, again.options.max_tokens) == ("mean", 33)
    assert torch.equal(again.encode(items()), encoder.encode(items()))
    assert again.fingerprint() == encoder.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_with_a_trained_part_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    encoder = Encoder.build(ModelConfig(path=f"builtin/tiny-{family}"), LoraConfig(rank=2, dora=True))
    encoder.train_only(("projector",))
    trained = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    encoder.save_pretrained(tmp_path / "once")
    again = Encoder.from_pretrained(tmp_path / "once")
    rows = encoder.encode(items())
    assert torch.equal(again.encode(items()), rows)
    assert (Encoder.from_pretrained(f"builtin/tiny-{family}").encode(items()) - rows).abs().max() > 1e-3
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(Encoder.from_pretrained(tmp_path / "twice").encode(items()), rows)
    assert torch.equal(Encoder.from_pretrained(f"builtin/tiny-{family}", adapter=tmp_path / "once").encode(items()), rows)


def test_the_head_is_never_trained() -> None:
    encoder = Encoder.build(ModelConfig(path="builtin/tiny-smolvlm"))
    encoder.train_only(("language", "projector", "vision"))
    assert {encoder.backbone.part_of(name) for name, parameter in encoder.model.named_parameters() if parameter.requires_grad} == {
        "language",
        "projector",
        "vision",
    }


def test_the_fingerprint_changes_with_all_that_changes_an_embedding() -> None:
    def fingerprint(**options: object) -> str:
        return Encoder.from_pretrained("builtin/tiny-qwen2_vl", **options).fingerprint()

    seen = {
        fingerprint(),
        fingerprint(pooling="mean"),
        fingerprint(max_tokens=7),
        fingerprint(dtype="bfloat16"),
        fingerprint(max_pixels=3136 * 4),
        fingerprint(positions="flat"),
    }
    assert len(seen) == 6
    one_weight = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    next(one_weight.model.parameters()).data.view(-1)[0] += 1
    autocast = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    autocast.precision = "bf16"
    assert len(seen | {one_weight.fingerprint(), autocast.fingerprint()}) == 8
    assert fingerprint() in seen


def test_a_folder_of_a_newer_format_or_an_adapter_without_its_part_is_refused(tmp_path: Path) -> None:
    encoder = Encoder.build(ModelConfig(path="builtin/tiny-qwen2_vl"), LoraConfig(rank=2))
    encoder.save_pretrained(tmp_path)
    settings = tmp_path / "vlm2vec.json"
    settings.write_text(settings.read_text().replace('"format": 1', '"format": 9').replace('"format":1', '"format":9'))
    with pytest.raises(ModelError, match="format 9"):
        Encoder.from_pretrained(tmp_path)
    settings.unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter_model.safetensors: not found, and no adapter_model.bin"):
        Encoder.from_pretrained(tmp_path)


def test_how_pictures_are_decoded_is_saved_and_old_folders_know_only_one_way(tmp_path: Path) -> None:
    exact = Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu")
    draft = Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu", decode="draft")
    assert exact.options.decode == "exact" and exact.fingerprint() != draft.fingerprint()
    draft.save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).fingerprint() == draft.fingerprint()
    settings = json.loads((tmp_path / "vlm2vec.json").read_text())
    assert settings["model"].pop("decode") == "draft"
    (tmp_path / "vlm2vec.json").write_text(json.dumps(settings))
    assert Encoder.from_pretrained(tmp_path).fingerprint() == exact.fingerprint()


def test_workers_hold_no_file_open_for_an_item(forked: Callable[..., int]) -> None:
    """A window of 300 items, each two tensors or more, in a process that may have 128 files open."""

    def encode() -> None:
        encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu")
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        assert encoder.encode([f"{number}" for number in range(300)], workers=2).shape == (300, 32)

    assert forked(encode) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_with_workers_the_main_process_decodes_nothing(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, here = batch.load_image, []
    monkeypatch.setattr(batch, "load_image", lambda image, **options: here.append(1) or original(image, **options))
    Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu").encode([picture(9)], workers=workers)
    assert len(here) == (0 if workers else 1)


def test_workers_take_blocks_that_end_with_their_window() -> None:
    assert list(_blocks([3, 40, 0, 16])) == [range(3), range(3, 19), range(19, 35), range(35, 43), range(43, 59)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_is_named_in_one_line_and_windows_before_it_are_whole(workers: int) -> None:
    """As evaluation needs it, which keeps every window that it was given."""
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl", device="cpu")
    items = [Item(f"{number}") for number in range(20)] + [Item(images=(ImageRef(b"", "row 20"),))]
    windows = encoder.stream(items, [18, 3], workers=workers)
    assert next(windows).shape == (18, 32)
    with pytest.raises(ImageError, match=r"^row 20: not an image \(the file is empty\)$"):
        next(windows)


def test_encoding_is_done_in_evaluation_mode_which_ends_with_it() -> None:
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl")
    first, *_ = encoder.model.modules()
    encoder.model.train()
    seen: list[bool] = []
    encoder.model.get_input_embeddings().register_forward_hook(lambda module, *_: seen.append(module.training or first.training))
    encoder.encode(["a"])
    assert seen == [False] and all(module.training for module in encoder.model.modules())
