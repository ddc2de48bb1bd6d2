"""Pictures in the terminal, where it has them: by kitty's protocol, by sixels, or as coloured half blocks, whichever it answers to."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROWS = 8  # lines of text that a picture takes
WIDEST = 240


def width() -> int:
    """Characters of a line: those of the terminal, and WIDEST where there is none."""
    return shutil.get_terminal_size((WIDEST, 24)).columns if sys.stdout.isatty() else WIDEST


def painter() -> Callable[[Path | bytes], None] | None:
    """A function that shows a picture; None without a terminal, with NO_COLOR, or without the package textual-image.

    The terminal is asked what it can do, and answers where input comes from: that must be a terminal too.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    if 0 in os.get_terminal_size(sys.stdout.fileno()):  # a serial line does not know its size, by which the library divides
        return None
    try:
        from rich.console import Console
        from textual_image.renderable import Image as Drawn
    except ImportError:
        return None
    console = Console()

    def paint(source: Path | bytes) -> None:
        from PIL import Image

        from vlm2vec.data.images import load_image
        from vlm2vec.data.types import ImageRef
        from vlm2vec.errors import ImageError

        try:
            picture: Image.Image = load_image(ImageRef(source, str(source)[:80]))
        except ImageError:
            console.print("      (the picture cannot be read any more)")
            return
        console.print(Drawn(picture, height=ROWS, width="auto"))

    return paint
