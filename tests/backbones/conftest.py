"""Miniatures of every family, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlm2vec.backbones import load_backbone, registry
from vlm2vec.backbones.base import Backbone
from vlm2vec.config import ModelConfig


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the miniature of a model type."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            to = tmp_path_factory.mktemp(model_type)
            made[model_type] = registry()[model_type].tiny_checkpoint(to, model_type=model_type)
        return made[model_type]

    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Callable[[str], Path]) -> Callable[..., Backbone]:
    """A freshly loaded miniature; keyword arguments are keys of the recipe's model section."""
    return lambda model_type, **options: load_backbone(ModelConfig(path=str(tiny_folder(model_type)), **options))
