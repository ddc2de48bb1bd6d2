"""One way from a picture reference to RGB pixels; how each Pillow mode becomes RGB is decided in one table, `_TO_RGB`.

Order: size of the file, size and shape from the header, decoding, mode table, EXIF orientation. Whatever is wrong is an ImageError whose
message begins with the reference's label. Pillow's global switches are left alone, and only the decoders of `FORMATS` are ever reached.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from vlm2vec.data.types import ImageRef
from vlm2vec.errors import EnvError, ImageError
from vlm2vec.io.paths import not_a_file
from vlm2vec.log import get_logger

DECODE_VERSION = 1  # part of every cache key: raise it when the pixels of any readable picture change
FORMATS = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)

# What Pillow's decoders raise on hostile bytes; Warning for callers that turn warnings into errors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Warning,
)

_logger = get_logger(__name__)
_said: set[str] = set()  # sources whose animated pictures were mentioned
_open_image = threading.Lock()  # an image opened by the caller shares one file position between threads
os.register_at_fork(before=_open_image.acquire, after_in_parent=_open_image.release, after_in_child=_open_image.release)


@dataclass(frozen=True)
class Limits:
    """What is read at all. `float_range` declares the values (black, white) of float pictures, which have no scale of their own."""

    pixels: int = 64_000_000
    bytes: int = 64_000_000  # of the encoded file
    aspect: float = 200.0  # longer side over shorter side
    float_range: tuple[float, float] | None = None


DEFAULT_LIMITS = Limits()
SCANS = 100  # of a JPEG; encoders write up to some twenty
COMMENTS = 100  # of a PPM file that is text
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)  # of a JPEG, less those that stand inside a scan
SPARE = 2  # a JPEG decoded below its size keeps this many times the width and the height that are needed
Needed = Callable[[int, int], tuple[int, int]]  # (width, height) of an upright picture -> those to which it will be resized


def load_image(ref: ImageRef, limits: Limits = DEFAULT_LIMITS, needed: Needed | None = None) -> Image.Image:
    """Decode a picture to a new 8-bit RGB image, upright, on white where it is transparent; of several frames the first.

    With `needed`, an encoded JPEG may come at a half, a quarter or an eighth of its size (`_reduce`); all else is the same.
    Raises ImageError if the picture is missing, no image, damaged or over the limits, EnvError if the storage fails.
    """
    if isinstance(ref.source, Image.Image):
        with _open_image:
            return _pixels(ref.source, ref.label, limits)
    data = _encoded(ref.source, ref.label, limits)
    _check_effort(data, ref.label)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        _refuse_unknown(data, ref.label, len(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+", str(error))
        count = f"{int(found[0]):,}" if found else "too many"
        raise ImageError(f"{ref.label}: image has {count} pixels, at most {limits.pixels:,} are read") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{ref.label}: image file is truncated or damaged ({error})") from error
    with image:
        return _pixels(image, ref.label, limits, needed)


def sniff(file: Path, label: str) -> None:
    """Raise ImageError if the first bytes of a file show that `load_image` could not read it; nothing is decoded."""
    try:
        with file.open("rb") as stream:
            head = stream.read(1024)
    except OSError as error:
        raise ImageError(f"{label}: {file} cannot be read: {error.strerror}") from error
    if not head.startswith(_READABLE):
        _refuse_unknown(head, label, file.stat().st_size)


def content_key(ref: ImageRef) -> str:
    """sha256 of what is in the picture, wherever it lies: the encoded bytes of a file, the decoded pixels of an open image."""
    if not isinstance(ref.source, Image.Image):
        return hashlib.sha256(_encoded(ref.source, ref.label, DEFAULT_LIMITS)).hexdigest()
    image = load_image(ref)
    return hashlib.sha256(f"{image.mode}:{image.width}x{image.height}:".encode("ascii") + image.tobytes()).hexdigest()


def _encoded(source: Path | bytes, label: str, limits: Limits) -> bytes:
    """The encoded bytes, at most `limits.bytes` of them."""
    if isinstance(source, bytes):
        _check_bytes(len(source), label, limits)
        return source
    try:
        if problem := not_a_file(source):
            raise ImageError(f"{label}: {source} is {problem}")
        _check_bytes(source.stat().st_size, label, limits)
        return source.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"{label}: no such file: {source}") from error
    except (PermissionError, ValueError) as error:
        raise ImageError(f"{label}: {source} cannot be read: {error}") from error
    except OSError as error:
        raise EnvError(f"{label}: reading {source} failed: {error.strerror}") from error


def _check_bytes(size: int, label: str, limits: Limits) -> None:
    if size > limits.bytes:
        raise ImageError(f"{label}: image file has {size:,} bytes, at most {limits.bytes:,} are read")


def _check_size(size: tuple[int, int], label: str, limits: Limits) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{label}: image is empty ({width}x{height} pixels)")
    if width * height > limits.pixels:
        raise ImageError(f"{label}: image has {width}x{height} = {width * height:,} pixels, at most {limits.pixels:,} are read")
    if max(size) > limits.aspect * min(size):
        raise ImageError(f"{label}: image is {width}x{height}, longer than {limits.aspect:g}:1")


def _check_effort(data: bytes, label: str) -> None:
    """Refuse what is made to take hours: each scan of a JPEG goes over all pixels, each comment of a PPM moves all that is behind it."""
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > SCANS and _scans(data) > SCANS:
        raise ImageError(f"{label}: JPEG of more than {SCANS} scans, which would take long to read; encode it anew")
    if data.startswith((b"P1", b"P2", b"P3")) and data.count(b"#") > COMMENTS:
        raise ImageError(f"{label}: PPM of more than {COMMENTS} comments, which would take long to read; encode it anew")


def _scans(data: bytes) -> int:
    """The scans of a JPEG up to its end, behind which other files may lie, or one more than are read.

    Between its segments, which say their length, only what follows the head of a scan may hold anything, and no marker.
    """
    scans, at = 0, 2
    while scans <= SCANS and (marker := _MARKER.search(data, at)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        at = marker.end() + (0 if marker[1] in b"\x01\xd8" else int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return scans


def _pixels(image: Image.Image, label: str, limits: Limits, needed: Needed | None = None) -> Image.Image:
    """Check the header, decode, convert, turn upright; the result carries no metadata that could be applied once more."""
    _check_size(image.size, label, limits)
    if image.mode not in _TO_RGB:
        raise ImageError(f"{label}: images of mode {image.mode} are not read")
    if needed is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        _reduce(image, needed)
    try:
        image.load()
        rgb = _TO_RGB[image.mode](image, limits)
        turn = _turn(image)
        _mention_frames(image, label)
    except _Unscaled as error:
        raise ImageError(f"{label}: {error}") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{label}: image file is truncated or damaged ({error})") from error
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info.clear()
    return upright


def _reduce(image: JpegImagePlugin.JpegImageFile, needed: Needed) -> None:
    """Have the decoder compute fewer pixels from each 8 x 8 block (scaled inverse DCT), as few as leave SPARE times what is needed.

    The scale must divide both sides: else the last block would reach beyond the picture, and all pixels be shifted against those of the
    full size. And it must not change what is needed, so that a picture gives as many tokens as at its full size.
    """
    sideways = _turn(image) in _SIDEWAYS
    width, height = image.size[::-1] if sideways else image.size
    target = needed(width, height)
    for scale in (8, 4, 2):
        reduced = (width // scale, height // scale)
        divides = (width % scale, height % scale) == (0, 0)
        if divides and reduced[0] >= SPARE * target[0] and reduced[1] >= SPARE * target[1] and needed(*reduced) == target:
            image.draft(None, reduced[::-1] if sideways else reduced)
            return


# ---- from every mode to RGB


class _Unscaled(Exception):
    """Pixel values without a known black and white."""


def _plain(image: Image.Image, limits: Limits) -> Image.Image:
    """Pillow's own conversion is right, except that it shows what a transparent colour hides."""
    return _on_white(image, limits) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image, limits: Limits) -> Image.Image:
    straight = image.convert("LA") if image.mode == "La" else image  # La converts to nothing but LA
    rgba = straight if straight.mode == "RGBA" else straight.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _integers(image: Image.Image, limits: Limits) -> Image.Image:
    """16-bit levels, also those held in 32 bits, to 8 bits: round(level / 257). Pillow's conversion would clip at 255: nearly all white."""
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > 65535:
        raise _Unscaled(f"32-bit image with levels {low:,} to {high:,}, but only 0 to 65,535 has a known scale: convert it to 8 or 16 bits")
    grey = _TO_8_BITS[levels]
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _floats(image: Image.Image, limits: Limits) -> Image.Image:
    if limits.float_range is None:
        raise _Unscaled("undeclared float image: say which values are black and white (Limits.float_range) or convert it to 8 bits")
    black, white = limits.float_range
    levels = (np.asarray(image, dtype=np.float64) - black) / (white - black) * 255
    if not np.isfinite(levels).all():
        raise _Unscaled("float image holds NaN or infinite values")
    return Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8)).convert("RGB")


def _lab(image: Image.Image, limits: Limits) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # it is None only when converting in place
    return converted


_TO_8_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # exact rounding: 257 is odd, so there are no ties

_TO_RGB: dict[str, Callable[[Image.Image, Limits], Image.Image]] = {
    "1": _plain,
    "L": _plain,
    "P": _plain,
    "RGB": _plain,
    "RGBX": _plain,
    "YCbCr": _plain,
    "HSV": _plain,
    "CMYK": _plain,  # Pillow has undone Adobe's inversion, and libjpeg YCCK, by then
    "LA": _on_white,
    "La": _on_white,
    "PA": _on_white,
    "RGBA": _on_white,
    "RGBa": _on_white,
    "I;16": _integers,
    "I;16L": _integers,
    "I;16B": _integers,
    "I;16N": _integers,
    "I": _integers,
    "F": _floats,
    "LAB": _lab,
}


# ---- orientation and frames

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}  # width and height change places


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What puts the picture upright. Asked after loading, since Pillow's TIFF reader turns by itself and then drops the tag."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except _DECODER_ERRORS:
        return None  # cameras and editors write broken EXIF blocks around sound pixels


def _mention_frames(image: Image.Image, label: str) -> None:
    """Say once per source (what stands before " row " in the label) that only one frame is read."""
    source = label.partition(" row ")[0]
    if source not in _said and getattr(image, "is_animated", False):
        _said.add(source)
        _logger.warning("%s: several frames or pages, of which only the first is read (said once for %s)", label, source)


# ---- naming what is no readable image

_SIGNATURES = (
    (0, b"%PDF", "PDF"),
    (0, b"version https://git-lfs", "a Git-LFS pointer: run `git lfs pull`"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\1\0", "an icon"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (4, b"ftyp", "MP4 video"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "gzip data"),
)
_READABLE = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


def _refuse_unknown(data: bytes, label: str, size: int) -> NoReturn:
    """`data` are the first bytes at least, `size` is the number of all."""
    if not data:
        raise ImageError(f"{label}: not an image (the file is empty)")
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            raise ImageError(f"{label}: not a readable image (looks like {name}); readable are {', '.join(FORMATS)}")
    if data.startswith(_READABLE):
        raise ImageError(f"{label}: image file is truncated or damaged (its header cannot be read)")
    raise ImageError(f"{label}: not an image (looks like {_kind_of_text(data[:1024])}, {size:,} bytes)")


def _kind_of_text(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").strip().lower()
    if b"<svg" in text:
        return "SVG"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in text:
        return "HTML"
    if text.startswith(b"<"):
        return "XML"
    if text.startswith((b"{", b"[")):
        return "JSON"
    return "text" if text and all(byte >= 32 or byte in b"\t\r\n" for byte in text) else "binary data of no known format"
