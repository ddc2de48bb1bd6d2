"""Identity of pictures and items: equal keys mean equal embeddings, and nothing else has equal keys."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlm2vec.data.types import ImageRef, Item


def palette_picture(colour: int) -> Image.Image:
    image = Image.new("P", (4, 4))
    image.putpalette([colour, 0, 0] * 256)
    return image


def turned(orientation: int) -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.getexif()[0x0112] = orientation
    return image


def test_pictures_that_decode_differently_have_different_keys() -> None:
    clear = palette_picture(1)
    clear.info["transparency"] = 0
    pictures = [
        palette_picture(1),
        palette_picture(2),
        clear,
        turned(1),
        turned(6),
        Image.new("RGB", (2, 8)),
        Image.new("L", (4, 4)),
        Path("a.png"),
        b"a.png",
    ]
    assert len({ImageRef(picture).key for picture in pictures}) == len(pictures)
    assert ImageRef(palette_picture(1)).key == ImageRef(palette_picture(1)).key


def test_a_label_is_for_people_only() -> None:
    assert ImageRef(b"x", "row 1").key == ImageRef(b"x", "row 2").key and ImageRef(b"x", "row 1") == ImageRef(b"x", "row 2")


def test_fields_cannot_run_into_one_another() -> None:
    items = [
        Item("b", (ImageRef(Path("/x")),)),
        Item("b\0path:/x"),
        Item("b", instruction="a"),
        Item("a b"),
        Item(instruction="a", text="b\0path:/x"),
    ]
    assert len({item.key for item in items}) == len(items)
