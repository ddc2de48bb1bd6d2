"""transformers' processors without their video half, which cannot be made where torchvision is not installed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import ProcessorMixin
from transformers.utils import is_torchvision_available

VIDEO = "video_processor"


@contextmanager
def pictures_only() -> Iterator[None]:
    """Inside, processors that also read videos can be loaded and used for texts and pictures; with torchvision nothing changes."""
    if is_torchvision_available():
        yield
        return
    mixin: Any = ProcessorMixin
    attributes, build = mixin.get_attributes.__func__, mixin.from_args_and_dict.__func__

    def without_video(cls: Any) -> list[str]:
        return [name for name in attributes(cls) if name != VIDEO]

    def built_without(cls: Any, args: Any, settings: dict[str, Any], **kwargs: Any) -> Any:
        wanted = VIDEO in inspect.signature(cls.__init__).parameters
        return build(cls, args, settings, **kwargs, **({VIDEO: None} if wanted else {}))

    with (
        patch.object(mixin, "get_attributes", classmethod(without_video)),
        patch.object(mixin, "from_args_and_dict", classmethod(built_without)),
        patch.object(mixin, VIDEO, SimpleNamespace(num_frames=None, fps=None), create=True),  # one class asks for them before any video
    ):
        yield
