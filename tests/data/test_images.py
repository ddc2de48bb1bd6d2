from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import resource
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vlm2vec.data import images
from vlm2vec.data.images import FORMATS, Limits, content_key, load_image
from vlm2vec.data.types import ImageRef
from vlm2vec.errors import EnvError, ImageError

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)
QUADRANTS = np.repeat(np.repeat(np.array([[RED, GREEN, BLUE], [WHITE, GREY, (10, 200, 90)]], dtype=np.uint8), 16, axis=0), 16, axis=1)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source: bytes | Path | Image.Image, limits: Limits = images.DEFAULT_LIMITS) -> np.ndarray:
    image = load_image(ImageRef(source, label="set row 7: image 'x'"), limits)
    assert type(image) is Image.Image and image.mode == "RGB" and image.info == {}
    return np.asarray(image).astype(int)


def colour(source: bytes | Image.Image) -> tuple[int, ...]:
    """The one colour of a plain picture."""
    array = pixels(source)
    assert (array == array[0, 0]).all()
    return tuple(array[0, 0])


def refused(source: bytes | Path | Image.Image, limits: Limits = images.DEFAULT_LIMITS) -> str:
    """The message, less the label that it must begin with."""
    label = "OK-VQA row 1841: image 'Train/xyz.jpg'"
    with pytest.raises(ImageError) as caught:
        load_image(ImageRef(source, label), limits)
    assert str(caught.value).startswith(label + ": ")
    return str(caught.value).removeprefix(label + ": ")


def plain(mode: str, value: object) -> Image.Image:
    return Image.new(mode, (8, 8), value)  # type: ignore[arg-type]


def premultiplied(mode: str, value: tuple[int, ...]) -> Image.Image:
    return plain(mode, value).convert(mode[:-1] + "a")


def with_levels(*levels: int) -> bytes:
    """A 16-bit grey PNG of one level, with that or another level declared transparent."""
    level, *transparent = (struct.pack(">H", one) for one in levels)
    return png(4, 4, 16, 0, (b"\0" + level * 4) * 4, png_chunk(b"tRNS", transparent[0]))


def with_palette(colours: list[tuple[int, ...]], mode: str = "RGB") -> Image.Image:
    image = plain("P", 1)
    image.putpalette([channel for one in colours for channel in one], mode)
    return image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, kind: int = 0, data: bytes = b"", before: bytes = b"") -> bytes:
    """A PNG from its parts: a header can then claim anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


def ycck(luma: int, blue: int, red: int, key: int) -> bytes:
    """A YCCK JPEG: the four stored components as they are, with Adobe's transform byte set to 2."""
    jpeg = encode(plain("CMYK", tuple(255 - stored for stored in (luma, blue, red, key))), "JPEG", quality=100)
    at = jpeg.index(b"Adobe") + 11
    assert jpeg[at] == 0
    return jpeg[:at] + b"\x02" + jpeg[at + 1 :]


# ---- every mode


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(encode(plain("1", 1)), WHITE, id="1"),
        pytest.param(encode(plain("1", 0)), (0, 0, 0), id="1 black"),
        pytest.param(encode(plain("L", 77)), (77, 77, 77), id="L"),
        pytest.param(encode(plain("L", 77), transparency=77), WHITE, id="L with transparent level"),
        pytest.param(encode(plain("L", 77), transparency=78), (77, 77, 77), id="L with another transparent level"),
        pytest.param(encode(plain("RGB", (1, 2, 3))), (1, 2, 3), id="RGB"),
        pytest.param(encode(plain("RGB", (1, 2, 3)), transparency=(1, 2, 3)), WHITE, id="RGB with transparent colour"),
        pytest.param(encode(with_palette([RED, (9, 8, 7)])), (9, 8, 7), id="P"),
        pytest.param(encode(with_palette([RED, (9, 8, 7)]), transparency=1), WHITE, id="P with transparent index"),
        pytest.param(encode(with_palette([RED, (9, 8, 7)]), transparency=b"\xff\x80"), (132, 131, 131), id="P with alpha table"),
        pytest.param(with_palette([(*RED, 255), (9, 8, 7, 0)], "RGBA"), WHITE, id="P with RGBA palette"),
        pytest.param(encode(with_palette([RED, (9, 8, 7)]), "GIF", transparency=1), WHITE, id="GIF with transparent index"),
        pytest.param(encode(plain("LA", (50, 255))), (50, 50, 50), id="LA opaque"),
        pytest.param(encode(plain("LA", (50, 0))), WHITE, id="LA transparent"),
        pytest.param(premultiplied("LA", (50, 0)), WHITE, id="La transparent"),
        pytest.param(premultiplied("LA", (50, 255)), (50, 50, 50), id="La opaque"),
        pytest.param(encode(plain("RGBA", (0, 100, 200, 0))), WHITE, id="RGBA transparent"),
        pytest.param(encode(plain("RGBA", (0, 100, 200, 255))), (0, 100, 200), id="RGBA opaque"),
        pytest.param(encode(plain("RGBA", (0, 100, 200, 51))), (204, 224, 244), id="RGBA one fifth"),
        pytest.param(encode(plain("RGBA", (0, 100, 200, 51)), "WEBP", lossless=True), (204, 224, 244), id="RGBA WebP"),
        pytest.param(encode(plain("RGBA", (0, 100, 200, 51)), "TIFF"), (204, 224, 244), id="RGBA TIFF"),
        pytest.param(premultiplied("RGBA", (0, 100, 200, 255)), (0, 100, 200), id="RGBa opaque"),
        pytest.param(premultiplied("RGBA", (0, 100, 200, 0)), WHITE, id="RGBa transparent"),
        pytest.param(plain("RGBX", (1, 2, 3, 0)), (1, 2, 3), id="RGBX"),
        pytest.param(with_palette([RED, (9, 8, 7)]).convert("PA"), (9, 8, 7), id="PA"),
        pytest.param(plain("YCbCr", (130, 128, 128)), (130, 130, 130), id="YCbCr"),
        pytest.param(plain("HSV", (85, 255, 255)), GREEN, id="HSV"),
        pytest.param(encode(plain("CMYK", (255, 0, 0, 0)), "TIFF"), (0, 255, 255), id="CMYK TIFF"),
        pytest.param(plain("I;16", 257 * 99), (99, 99, 99), id="I;16"),
        pytest.param(plain("I;16B", 257 * 99), (99, 99, 99), id="I;16B"),
        pytest.param(plain("I;16L", 257 * 99), (99, 99, 99), id="I;16L"),
        pytest.param(plain("I", 257 * 99), (99, 99, 99), id="I"),
        pytest.param(with_levels(4660, 4660), WHITE, id="I;16 with transparent level"),
        pytest.param(with_levels(257 * 99, 4660), (99, 99, 99), id="I;16 with another transparent level"),
        pytest.param(png(4, 4, 16, 2, (b"\0" + b"\x63\x63\x0a\x0a\xff\xff" * 4) * 4), (99, 10, 255), id="RGB of 16 bits"),
        pytest.param(b"P5 2 2 65535\n" + b"\x63\x63" * 4, (99, 99, 99), id="PGM of 16 bits"),
        pytest.param(encode(plain("I;16", 257 * 99), "TIFF"), (99, 99, 99), id="TIFF of 16 bits"),
        pytest.param(encode(plain("I", 257 * 99), "TIFF"), (99, 99, 99), id="TIFF of 32 bits"),
    ],
)
def test_mode_is_pixel_exact(source: bytes | Image.Image, expected: tuple[int, ...]) -> None:
    assert colour(source) == expected


def test_every_mode_of_pillow_is_in_the_table() -> None:
    assert set(images._TO_RGB) >= {*Image.MODES, "PA", "La", "RGBa", "LAB", "HSV"}
    assert refused(_with_mode("BGR;15")) == "images of mode BGR;15 are not read"


def _with_mode(mode: str) -> Image.Image:
    image = plain("RGB", RED)
    image._mode = mode
    return image


@pytest.mark.parametrize("cmyk", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (40, 90, 200, 30), (200, 10, 10, 128)])
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_within_three_levels(format: str, cmyk: tuple[int, ...]) -> None:
    options = {"quality": 100} if format == "JPEG" else {}
    *inks, key = cmyk
    expected = [(255 - ink) * (255 - key) / 255 for ink in inks]
    assert np.abs(pixels(encode(plain("CMYK", cmyk), format, **options)) - expected).max() <= 3


@pytest.mark.parametrize("stored", [(255, 128, 128, 255), (100, 128, 128, 255), (76, 84, 255, 255), (150, 60, 180, 140)])
def test_ycck_within_three_levels(stored: tuple[int, ...]) -> None:
    luma, blue, red, key = stored
    green = luma - 0.344 * (blue - 128) - 0.714 * (red - 128)
    inks = np.array([luma + 1.402 * (red - 128), green, luma + 1.772 * (blue - 128)]).clip(0, 255)  # inverted twice: by libjpeg and Adobe
    assert np.abs(pixels(ycck(*stored)) - (255 - inks) * key / 255).max() <= 3


SRGB_TO_XYZ_D50 = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7142]])


def lab_of(rgb: tuple[int, ...]) -> tuple[int, ...]:
    """CIE L*a*b* of an sRGB colour under D50 as 8-bit files store it: L* times 2.55, a* and b* plus 128."""
    share = np.array(rgb) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(SRGB_TO_XYZ_D50 @ linear / SRGB_TO_XYZ_D50.sum(axis=1))
    return round((116 * y - 16) * 2.55), round(500 * (x - y) + 128), round(200 * (y - z) + 128)


@pytest.mark.parametrize("rgb", [WHITE, GREY, (60, 60, 60), (150, 80, 60), (90, 140, 200), (200, 190, 90), (120, 60, 130)])
def test_lab_within_three_levels(rgb: tuple[int, ...]) -> None:
    for source in (plain("LAB", lab_of(rgb)), encode(plain("LAB", lab_of(rgb)), "TIFF")):
        assert np.abs(pixels(source) - rgb).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_ramp_keeps_its_mean(format: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    read = pixels(encode(Image.fromarray(ramp), format))
    assert abs(read.mean() - 127.5) <= 1
    assert (read[..., 0] == np.floor(ramp / 257 + 0.5)).all()


def test_32_bit_levels_without_a_known_scale_are_refused() -> None:
    assert refused(plain("I", 65536)) == (
        "32-bit image with levels 65,536 to 65,536, but only 0 to 65,535 has a known scale: convert it to 8 or 16 bits"
    )
    assert "levels -1 to -1" in refused(encode(plain("I", -1), "TIFF"))


def test_float_image_must_be_declared() -> None:
    ramp = Image.fromarray(np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16))
    data = encode(ramp, "TIFF")
    assert refused(data).startswith("undeclared float image")
    assert (pixels(data, Limits(float_range=(-1.0, 1.0)))[..., 2].ravel() == np.arange(256)).all()
    assert (pixels(data, Limits(float_range=(1.0, -1.0)))[..., 2].ravel() == np.arange(256)[::-1]).all()
    assert pixels(data, Limits(float_range=(2.0, 3.0))).max() == 0
    hole = np.zeros((4, 4), dtype=np.float32)
    hole[1, 1] = np.nan
    assert "NaN" in refused(Image.fromarray(hole), Limits(float_range=(0.0, 1.0)))


# ---- orientation, frames, format

UNDO = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.rotate(90, expand=True),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.rotate(-90, expand=True),
}


def turned(orientation: int, format: str) -> bytes:
    """The quadrants as a camera held so stores them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    return encode(UNDO[orientation](Image.fromarray(QUADRANTS)), format, exif=exif, **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UNDO)
def test_orientation_gives_the_same_array(orientation: int, format: str, tmp_path: Path) -> None:
    data = turned(orientation, format)
    (tmp_path / "file").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    for source in (data, tmp_path / "file", opened, Image.open(io.BytesIO(data)).convert("RGB") if format != "TIFF" else data):
        assert np.abs(pixels(source) - QUADRANTS).max() <= (2 if format == "JPEG" else 0)


def test_upright_picture_is_not_turned_again() -> None:
    once = load_image(ImageRef(turned(6, "PNG")))
    assert (pixels(once) == QUADRANTS).all()
    assert (pixels(encode(once)) == QUADRANTS).all()


BROKEN_EXIF = [b"garbage", b"", b"MM\0*", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f"]


@pytest.mark.parametrize("exif", BROKEN_EXIF)
def test_broken_exif_is_ignored(exif: bytes) -> None:
    for format, options in (("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(Image.fromarray(QUADRANTS), format, exif=b"Exif\0\0" + exif, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.abs(pixels(data) - QUADRANTS).max() <= 2
            warnings.simplefilter("error")
            try:
                pixels(data)
            except ImageError:  # Pillow's JPEG reader warns about EXIF as it opens the file, and here that is an error
                assert format == "JPEG"


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_orientation_out_of_range_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert (pixels(encode(Image.fromarray(QUADRANTS), "PNG", exif=exif)) == QUADRANTS).all()


def animated(format: str) -> bytes:
    frames = [plain("RGB", RED), plain("RGB", GREEN), plain("RGB", BLUE)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_is_read_and_that_is_said_once_per_source(
    format: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_said", set())
    data = animated(format)
    with caplog.at_level(logging.WARNING, "vlm2vec"):
        for source in ("OK-VQA", "GQA"):
            for row in range(3):
                image = load_image(ImageRef(data, f"{source} row {row}: image 'a.gif'"))
                assert image.getpixel((0, 0)) == RED
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["OK-VQA row 0", "GQA row 0"]


def test_single_frames_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for format in ("PNG", "GIF", "WEBP", "TIFF", "JPEG"):
        pixels(encode(plain("RGB", RED), format))
    assert caplog.text == ""


@pytest.mark.parametrize("format", FORMATS)
def test_content_decides_not_the_extension(format: str, tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(encode(plain("RGB", RED), format))
    assert np.abs(pixels(tmp_path / "picture.txt") - RED).max() <= 2


@pytest.mark.parametrize("format", ["ICO", "TGA", "PCX", "JPEG2000", "AVIF", "EPS", "SGI", "DDS", "PDF", "IM", "XBM"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_decoders_outside_the_list_are_never_reached(format: str) -> None:
    data = encode(plain("1" if format == "XBM" else "RGB", 1 if format == "XBM" else RED), format)
    Image.init()
    message = refused(data)
    assert "image" in message and "truncated" not in message


# ---- what is no picture


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\xef\xbb\xbf\n <html>", "HTML"),
        (b"<?xml version='1.0'?><!DOCTYPE html PUBLIC><html>", "HTML"),
        (b'{"error": "not found"}', "JSON"),
        (b'[{"error": 1}]', "JSON"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<svg/>", "SVG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "MP4"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git-LFS pointer"),
        (b"PK\x03\x04" + b"\0" * 30, "ZIP"),
        (b"\x1f\x8b\x08" + b"\0" * 30, "gzip"),
        (b"not found\n", "text"),
        (b"\x93NUMPY\x01\0", "no known format"),
        (b"\0" * 5000, "no known format"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(data)
    for source in (data, tmp_path / "picture.jpg"):
        message = refused(source)
        assert kind in message and message.startswith("not a")


def photo(format: str) -> bytes:
    noise = np.random.default_rng(17).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore")
def test_truncated_file_is_an_error(format: str, share: float) -> None:
    data = photo(format)
    assert refused(data[: max(12, int(len(data) * share))]).startswith("image file is truncated")


def test_missing_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(tmp_path / "missing.png") == f"no such file: {tmp_path}/missing.png"
    (tmp_path / "file").write_bytes(b"")
    assert "no such file" in refused(tmp_path / "file" / "below.png")
    assert "not a regular file but a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file but a pipe" in refused(tmp_path / "pipe")
    assert "not a regular file but a device" in refused(Path("/dev/zero"))
    assert "too long" in refused(tmp_path / ("x" * 300))
    assert "null" in refused(Path("a\0b"))

    def fail(path: Path) -> bytes:
        raise error

    monkeypatch.setattr(Path, "read_bytes", fail)
    error: OSError = PermissionError(13, "Permission denied")
    assert "Permission denied" in refused(tmp_path / "file")
    error = OSError(5, "Input/output error")
    with pytest.raises(EnvError, match="label: reading .* failed: Input/output error"):
        load_image(ImageRef(tmp_path / "file", "label"))


# ---- limits, from the header alone


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20_000, 20_000, "image has 400,000,000 pixels, at most 64,000,000 are read"),
        (13_000, 13_000, "image has 13000x13000 = 169,000,000 pixels, at most 64,000,000 are read"),
        (8_001, 8_000, "image has 8001x8000 = 64,008,000 pixels, at most 64,000,000 are read"),
        (1, 1_000_000, "image is 1x1000000, longer than 200:1"),
        (2000, 3, "image is 2000x3, longer than 200:1"),
        (1, 201, "image is 1x201, longer than 200:1"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bomb_is_refused_from_its_header(width: int, height: int, message: str) -> None:
    data = png(width, height, data=b"\0" * 100)
    began = time.process_time()
    assert refused(data) == message
    assert time.process_time() - began < 0.05


def test_bomb_warning_turned_into_an_error_is_an_image_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused(png(13_000, 13_000)) == "image has 169,000,000 pixels, at most 64,000,000 are read"


def test_gif_frame_larger_than_its_screen_is_refused() -> None:
    data = bytearray(encode(plain("RGB", RED), "GIF"))
    at = data.index(b"\x2c\0\0\0\0") + 5
    data[at : at + 4] = struct.pack("<HH", 60_000, 60_000)
    assert refused(bytes(data)) == "image has 3,600,000,000 pixels, at most 64,000,000 are read"


def test_compressed_text_bomb_is_refused() -> None:
    bomb = png_chunk(b"zTXt", b"key\0\0" + zlib.compress(b"a" * 50_000_000))
    began = time.process_time()
    assert "truncated or damaged" in refused(png(4, 4, data=b"\0" * 20, before=bomb))
    assert time.process_time() - began < 0.5


def scanned(times: int, behind: bytes = b"", before: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan, which changes nothing any more, comes so many times more."""
    whole = encode(Image.fromarray(QUADRANTS), "JPEG", progressive=True, quality=95)
    tables = whole.rfind(b"\xff\xc4")
    return whole[:2] + before + whole[2:tables] + whole[tables:-2] * (times + 1) + whole[-2:] + behind


def segment(kind: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


def test_a_jpeg_of_scans_without_end_is_refused() -> None:
    """A file of 32 MB could hold half a million, of a twentieth of a second each."""
    own = images._scans(scanned(0))
    assert own == scanned(0).count(b"\xff\xda") > 5
    most = images.SCANS - own
    np.testing.assert_array_equal(pixels(scanned(most)), pixels(scanned(0)))
    hiding = [b"", b"\xff\x01", b"\xff" * 9 + segment(0xFE, b"\xff\xd9")[1:], segment(0xE1, b"\xff\xda" * 300 + b"\xff\xd9")]
    for before in hiding:
        assert "JPEG of more than 100 scans" in refused(scanned(most + 1, before=before))


def test_what_looks_like_scans_beside_them_does_no_harm() -> None:
    """Small copies inside segments, and the films that telephones put behind a picture."""
    expected = pixels(scanned(0))
    for beside in (segment(0xE1, b"\xff\xda" * 300), segment(0xFE, scanned(0) * 20)):
        np.testing.assert_array_equal(pixels(scanned(0, before=beside)), expected)
    np.testing.assert_array_equal(pixels(scanned(0, behind=b"\0\0ftyp" + b"\xff\xda\0\2" * 300)), expected)


def test_a_ppm_of_comments_without_end_is_refused() -> None:
    """Each moves all text behind it: four megabytes take a minute."""
    for magic in (b"P1", b"P2", b"P3"):
        assert "PPM of more than 100 comments" in refused(magic + b"\n2 1\n" + b"#\n" * 101 + b"255\n0 0 0 0 0 0\n")
    assert colour(b"P2\n2 1\n255\n" + b"# so many\n" * 100 + b"7 7\n") == (7, 7, 7)
    assert pixels(b"P6\n9 9\n255\n" + b"#" * 243).shape == (9, 9, 3)


def test_large_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(64_000_001)
    assert refused(tmp_path / "large.png") == "image file has 64,000,001 bytes, at most 64,000,000 are read"
    assert refused(b"\0" * 11, Limits(bytes=10)) == "image file has 11 bytes, at most 10 are read"


def test_limits_hold_for_open_images_too() -> None:
    assert refused(Image.new("RGB", (0, 0))) == "image is empty (0x0 pixels)"
    assert refused(Image.new("RGB", (5, 0))) == "image is empty (5x0 pixels)"
    assert refused(Image.new("RGB", (20, 20)), Limits(pixels=399)) == "image has 20x20 = 400 pixels, at most 399 are read"
    assert "longer than 200:1" in refused(Image.new("1", (201, 1)))
    assert "truncated or damaged" in refused(png(0, 5)) or "empty" in refused(png(0, 5))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2, 3), (27, 27)])
def test_small_pictures_are_kept_as_they_are(size: tuple[int, int]) -> None:
    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        assert load_image(ImageRef(encode(Image.new("RGB", size, RED), format))).size == size


def test_pillow_switches_are_left_alone() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    pixels(photo("PNG"))
    refused(photo("PNG")[:300])
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


# ---- identity


def test_content_key_of_encoded_bytes_is_their_sha256(tmp_path: Path) -> None:
    data = photo("PNG")
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data)
    keys = {content_key(ImageRef(source)) for source in (data, tmp_path / "a.png", tmp_path / "b.jpg")}
    assert keys == {hashlib.sha256(data).hexdigest()}


def test_content_key_of_an_open_image_is_what_is_seen() -> None:
    base = Image.fromarray(QUADRANTS)
    same = [base, base.copy(), Image.open(io.BytesIO(encode(base))), base.convert("RGBA")]
    assert len({content_key(ImageRef(image, label=image.mode)) for image in same}) == 1
    different = [
        base,
        base.transpose(Image.Transpose.ROTATE_90),
        Image.fromarray(QUADRANTS.reshape(48, 32, 3)),
        Image.fromarray(QUADRANTS + 1),
        with_palette([RED, GREEN]),
        with_palette([RED, BLUE]),
        plain("L", 0),
        Image.new("L", (4, 16), 0),
    ]
    assert len({content_key(ImageRef(image)) for image in different}) == len(different)


# ---- threads, processes, fuzz


def test_one_open_image_in_many_threads_and_a_fork(tmp_path: Path, forked: Callable[..., int]) -> None:
    large = np.random.default_rng(17).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "a.png", compress_level=1)
    shared, right = Image.open(tmp_path / "a.png"), []
    threads = [threading.Thread(target=lambda: right.append((pixels(shared) == large).all())) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert forked(lambda: pixels(Image.open(tmp_path / "a.png"))) == 0  # the lock is not left taken in the child
    for thread in threads:
        thread.join()
    assert right == [True] * 8


def test_result_is_a_copy() -> None:
    mine = plain("RGB", RED)
    load_image(ImageRef(mine)).paste(BLUE, (0, 0, 8, 8))
    assert mine.getpixel((0, 0)) == RED


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Cut, flip, insert, repeat, or replace by noise; biased to the header, where the decoders decide."""
    kind = chance.randrange(5)
    at = min(int(chance.expovariate(1) * 60), len(data) - 1) if chance.random() < 0.5 else chance.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            flipped[chance.randrange(at, len(data))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:at] + chance.randbytes(chance.randint(1, 64)) + data[at:]
    if kind == 3:
        return data[: at + 16] + data[at:]
    return data[:at] + chance.randbytes(8) + data[at + 8 :]


def seeds() -> list[bytes]:
    exif = turned(6, "JPEG")
    moving = [animated(format) for format in ("GIF", "WEBP", "PNG", "TIFF")]
    modes = [ycck(150, 60, 180, 140), encode(plain("LAB", (136, 208, 195)), "TIFF"), encode(with_palette([RED, BLUE]), transparency=1)]
    compressed = encode(Image.fromarray(QUADRANTS), "TIFF", compression="tiff_lzw")
    return [*(photo(format) for format in FORMATS), *moving, *modes, exif, with_levels(9, 9), compressed]


@pytest.mark.filterwarnings("ignore")
def test_fuzz_1000_mutated_pictures_decode_or_are_refused() -> None:
    chance, sound, slowest, outcomes = random.Random(17), seeds(), 0.0, {"decoded": 0, "refused": 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for trial in range(1000):
        data = mutate(sound[trial % len(sound)], chance)
        began = time.process_time()
        try:
            load_image(ImageRef(data, label=f"trial {trial}"))
            outcomes["decoded"] += 1
        except ImageError as error:
            assert str(error).startswith(f"trial {trial}: ")
            outcomes["refused"] += 1
        slowest = max(slowest, time.process_time() - began)
    assert sum(outcomes.values()) == 1000
    assert min(outcomes.values()) > 100
    assert slowest < 2  # seconds of this process
    # One of them is a GIF of 210 bytes that declares 28 megapixels, which is allowed: 4 bytes per pixel, twice while it is laid on white.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400 * 1024
