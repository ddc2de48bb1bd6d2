"""Models that can be had without the Hub, made on first use.

    vista-minilm      all-MiniLM-L6-v2 reading an ImageNet MobileNetV2 through a projector that is yet to be trained
    smolvlm-scratch   a SmolVLM of about 4.7 M parameters, nothing pre-trained
    smolvlm-smollm2   SmolLM2-135M-Instruct inside a SmolVLM whose small vision half is random: no package carries a published one
    tiny-<type>       the miniature of a family, for tests and the tiny form of recipes

Each lies in the cache folder (VLM2VEC_CACHE, or ~/.cache/vlm2vec) under a name with a digest of the code and packages that made it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlm2vec.backbones import assemble, registry
from vlm2vec.backbones.assemble import EMOJI, GGUF, ICONS, LOGOS, MINILM, MOBILENET, RESVG, SMOLLM2, Package
from vlm2vec.errors import EnvError, ModelError
from vlm2vec.io import MANIFEST, cache_folder, digest, publishing, sha256_file

BUILTIN: dict[str, tuple[Callable[[Path], Any], tuple[Package, ...]]] = {
    "vista-minilm": (assemble.vista_minilm, (MINILM, MOBILENET, LOGOS, RESVG)),
    "smolvlm-scratch": (assemble.smolvlm_scratch, (ICONS, EMOJI)),
    "smolvlm-smollm2": (assemble.smolvlm_smollm2, (SMOLLM2, GGUF)),
}
TINY = "tiny-"


def builtin_names() -> list[str]:
    """All names that `builtin_checkpoint` knows."""
    return [*BUILTIN, *(TINY + model_type for model_type in sorted(registry()))]


def builtin_checkpoint(name: str) -> Path:
    """Folder of the built-in model `name`, made if need be.

    Raises ModelError for an unknown name or a missing package, EnvError if the cache cannot be written.
    """
    make, packages = _recipe(name)
    folder = cache_folder() / "builtin" / f"{name}-{_digest(packages)[:12]}"
    if not (folder / MANIFEST).exists():
        with _alone(folder):
            if not (folder / MANIFEST).exists():  # another rank may have made it while this one waited
                with publishing(folder) as staging:
                    make(staging)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making `folder` at the same time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire()
    except OSError as error:
        raise EnvError(f"cannot write {folder.parent}: {error.strerror}; set VLM2VEC_CACHE to a folder that can be written") from error
    with held:
        yield


def _recipe(name: str) -> tuple[Callable[[Path], Any], tuple[Package, ...]]:
    """What makes `name`, and the packages it is made from."""
    if name in BUILTIN:
        return BUILTIN[name]
    model_type = name.removeprefix(TINY)
    family = registry().get(model_type) if name.startswith(TINY) else None
    if family is None:
        near = difflib.get_close_matches(name, builtin_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise ModelError(f"no built-in model {name!r}{hint} There are: {', '.join(builtin_names())}")
    return lambda to: family.tiny_checkpoint(to, model_type=model_type), ()


def _digest(packages: tuple[Package, ...]) -> str:
    """Digest of the code of this folder and of the versions that a checkpoint is made with."""
    code = {file.name: sha256_file(file) for file in sorted(Path(__file__).parent.glob("*.py"))}
    names = ["torch", "transformers", "tokenizers", *(package.distribution for package in packages)]
    return digest([code, {name: _version(name) for name in names}])


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"  # making the model says what to install
