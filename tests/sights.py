"""Kinds of pictures that a smaller decode treats differently, of any size, from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Sight = Callable[[int, int], Image.Image]


def photo(width: int, height: int) -> Image.Image:
    """Amplitudes that fall as 1 / frequency, as in photographs, mostly in common to the colours, and some hard edges."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))

    def field() -> np.ndarray:
        values = np.fft.irfft2(amplitude * np.exp(2j * np.pi * random.random(amplitude.shape)), s=(height, width))
        return values / values.std()

    light = field()
    levels = 128 + 45 * np.stack([light + 0.5 * field() for _ in range(3)], -1)
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for left, top, size, *colour in random.integers(0, [width, height, min(width, height) // 5, 256, 256, 256], (12, 6)).tolist():
        draw.ellipse((left, top, left + size, top + size), fill=tuple(colour))
    return image


def text(width: int, height: int) -> Image.Image:
    """A page full of letters, black and dark red."""
    random, image, size = np.random.default_rng(0), Image.new("RGB", (width, height), "white"), max(12, height // 40)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for line, top in enumerate(range(size, height - size, int(size * 1.4))):
        letters = "".join(map(chr, random.integers(33, 127, 2 * width // size)))
        draw.text((size, top), letters, fill=(180, 0, 0) if line % 3 == 0 else (0, 0, 0), font=font)
    return image


def noise(width: int, height: int) -> Image.Image:
    """Every level of every pixel by chance: the worst case, far from any picture."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


SIGHTS: dict[str, Sight] = {"photo": photo, "text": text, "noise": noise}
