"""What the items of a step cost, before any is encoded: tokens and pictures, from the recipe's data or from stated assumptions.

Of data only rows and the headers of pictures are read. A picture's tokens and patches are those that the family's own processor makes of a
blank picture of its size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlm2vec import prompts
from vlm2vec.backbones.shapes import Shape
from vlm2vec.chunks import plan_chunks
from vlm2vec.config import Recipe
from vlm2vec.data.mixture import Mixture, mixture_of, total_steps
from vlm2vec.data.tiny import TINY_ROOT
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError
from vlm2vec.flops import Chunk, Grid
from vlm2vec.strict_yaml import parse, plain
from vlm2vec.suite import is_data_file, suite_file

Size = tuple[int, int]  # width and height in pixels
ITEMS = "items.yaml"  # beside a suite's datasets.yaml: what its training sets cost
UNKNOWN = {"query": {"text": 20, "pictures": [[640, 480]]}, "target": {"text": 8}}  # a source that nothing is known of
CHARACTERS = 4.3  # per token of English text, where the model's own tokenizer is not at hand
CHAT = 24  # control tokens and roles of a chat template
BATCHES = 8  # that stand for all
BLOCKS = 40  # that stand for all where data come in blocks
SIZES = 48  # different picture sizes looked at; others are taken for the nearest of them
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Picture:
    """What a model makes of a picture: tokens, grids of patches, and pixels: as given, squashed to a square, cut into patches."""

    tokens: int
    grids: tuple[tuple[Grid, int], ...]
    given: int
    squashed: int
    made: int


@dataclass(frozen=True)
class Entry:
    """One item: tokens with those of its pictures."""

    tokens: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Workload:
    """Items of one rank in some global batches. `basis` says where the figures come from, `packed` whether chunks are."""

    batches: tuple[tuple[Entry, ...], ...]
    steps: int
    basis: str
    packed: bool = False

    def chunks(self, budget: int) -> list[list[Chunk]]:
        """Chunks of each batch, longest items first, as a step plans them."""
        plans = [plan_chunks([entry.tokens for entry in batch], budget, self.packed) for batch in self.batches]
        return [
            [_chunk([batch[row] for row in rows], self.packed) for rows in plan] for batch, plan in zip(self.batches, plans, strict=True)
        ]

    @property
    def entries(self) -> list[Entry]:
        """Items of all batches."""
        return [entry for batch in self.batches for entry in batch]


def _chunk(entries: Sequence[Entry], packed: bool) -> Chunk:
    grids: Counter[Grid] = Counter()
    pictures = [picture for entry in entries for picture in entry.pictures]
    for picture in pictures:
        grids.update(dict(picture.grids))
    return Chunk(tuple(entry.tokens for entry in entries), grids, len(pictures), packed)


class Looker:
    """Sizes of pictures -> what the model makes of them."""

    def __init__(self, shape: Shape, patch: int) -> None:
        self.processor, self.patch = shape.backbone.processor, patch
        self.seen: dict[Size, Picture] = {}

    def look(self, size: Size) -> Picture:
        """A picture of this size, or of the nearest one seen when there were many."""
        edge = self.processor.edge_after_resize
        canvas = (edge, edge) if edge else size
        if canvas not in self.seen:
            if len(self.seen) >= SIZES:
                canvas = min(self.seen, key=lambda other: abs(math.log(other[0] / size[0])) + abs(math.log(other[1] / size[1])))
            else:
                self.seen[canvas] = self._process(canvas)
        found = self.seen[canvas]
        return replace(found, given=size[0] * size[1])

    def _process(self, canvas: Size) -> Picture:
        inputs = self.processor.image_inputs(Image.new("RGB", canvas))
        tokens = len(self.processor.image_token_ids(inputs))
        grids = self._grids(inputs, tokens)
        patches = sum(height * width * count for (height, width), count in grids.items())
        made = patches * self.patch**2 or inputs["pixel_values"].numel() // 3
        squashed = canvas[0] * canvas[1] if self.processor.edge_after_resize else 0
        return Picture(tokens, tuple(sorted(grids.items())), canvas[0] * canvas[1], squashed, made)

    def _grids(self, inputs: dict[str, Any], tokens: int) -> Counter[Grid]:
        """Grids of patches that attend to each other: the picture, or each of its tiles; a tower without patches gives one row of cells."""
        if "image_grid_thw" in inputs:
            return Counter({(int(height), int(width)): int(time) for time, height, width in inputs["image_grid_thw"].tolist()})
        if not self.patch:
            return Counter({(1, tokens): 1})
        *_, height, width = inputs["pixel_values"].shape
        return Counter({(height // self.patch, width // self.patch): inputs["pixel_values"].numel() // (3 * height * width)})


def workload(recipe: Recipe, shape: Shape, looker: Looker, ranks: int, mixture: Mixture | None = None) -> Workload:
    """Items of rank 0: from the data if they are there, or the `mixture` made of them; else as assumed."""
    mixture = mixture or mixture_at_hand(recipe)
    if mixture is None:
        return _assumed(recipe, shape, looker, ranks)
    return _sampled(recipe, mixture, total_steps(recipe, mixture), shape, looker, ranks)


def mixture_at_hand(recipe: Recipe) -> Mixture | None:
    """The recipe's pairs, None if their folder is not there. Raises DataError for a folder that holds something else."""
    return mixture_of(recipe) if recipe.data.root == TINY_ROOT or Path(recipe.data.root).is_dir() else None


def _sampled(recipe: Recipe, mixture: Mixture, steps: int, shape: Shape, looker: Looker, ranks: int) -> Workload:
    last = steps * recipe.train.accumulate - 1
    indices = sorted({index * last // (BATCHES - 1) for index in range(BATCHES)})
    batches = []
    for index in indices:
        items: dict[str, Item] = {}
        for pair in mixture.pairs(index, 0, ranks):
            items |= {item.key: item for item in (pair.query, pair.positive, *pair.negatives)}
        batches.append(tuple(_measure(item, recipe, shape, looker) for item in items.values()))
    how = "its tokenizer" if shape.tokenizes else f"{CHARACTERS} characters per token"
    basis = f"{len(indices)} global batches of {recipe.data.root}, picture headers, {how}"
    return Workload(tuple(batches), steps, basis, shape.backbone.processor.packed)


def _measure(item: Item, recipe: Recipe, shape: Shape, looker: Looker) -> Entry:
    words = "".join(piece for piece in prompts.split(prompts.render(item), len(item.images)) if isinstance(piece, str))
    if shape.tokenizes:
        text = len(shape.backbone.processor.tokenizer(words, add_special_tokens=False)["input_ids"])
    else:
        text = math.ceil(len(words) / CHARACTERS)
    return _entry(text, [_header(image) for image in item.images], recipe, shape, looker)


def _header(image: ImageRef) -> Size:
    if isinstance(image.source, Image.Image):
        return image.source.size
    try:
        with Image.open(BytesIO(image.source) if isinstance(image.source, bytes) else image.source) as opened:
            return opened.size
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{image.label}: its header cannot be read ({error})") from error


def _entry(text: int, sizes: Sequence[Sequence[int]], recipe: Recipe, shape: Shape, looker: Looker) -> Entry:
    processor = shape.backbone.processor
    pictures = tuple(looker.look((width, height)) for width, height in sizes)
    frame = len(processor.prefix) + len(processor.suffix)
    chat = CHAT + math.ceil(len(recipe.model.system or "") / CHARACTERS) if recipe.model.prompt == "chat" else 0
    return Entry(max(1, min(text, recipe.model.max_tokens) + frame + chat + sum(picture.tokens for picture in pictures)), pictures)


# -- without the data


def _assumed(recipe: Recipe, shape: Shape, looker: Looker, ranks: int) -> Workload:
    table, rows, named = _table(recipe)
    sizes = [min(rows.get(source.name, 1), source.cap or math.inf) for source in recipe.data.sources]
    weights = [source.weight for source in recipe.data.sources]
    shares = [size if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    known = [table.get(source.path or source.name, UNKNOWN) for source in recipe.data.sources]
    costs = [
        [_entry(side["text"], side.get("pictures", []), recipe, shape, looker) for side in (row["query"], row["target"])] for row in known
    ]
    pairs = max(1, recipe.train.global_batch // ranks)
    batches = tuple(tuple(entry for source in sources for entry in costs[source]) for sources in _draws(shares, pairs, recipe.data.block))
    return Workload(batches, _steps(recipe, rows), f"assumed, {recipe.data.root} is not there: {named}", shape.backbone.processor.packed)


def _table(recipe: Recipe) -> tuple[dict[str, Any], dict[str, int], str]:
    """Costs and rows of training sets by name, and what to call the source."""
    if recipe.evaluate.suite is None or is_data_file(recipe.evaluate.suite):
        return {}, {}, f"every pair a query of {UNKNOWN['query']} and a target of {UNKNOWN['target']}"
    file = suite_file(recipe.evaluate.suite)
    rows = {row["name"]: row["rows"] for row in plain(parse(file.read_bytes(), str(file))).get("train", [])}
    items = file.with_name(ITEMS)
    if not items.is_file():
        return {}, rows, f"every pair a query of {UNKNOWN['query']} and a target of {UNKNOWN['target']}"
    return plain(parse(items.read_bytes(), str(items)))["items"], rows, f"{items.parent.name}/{items.name}, typical texts and pictures"


def _steps(recipe: Recipe, rows: dict[str, int]) -> int:
    if recipe.train.steps is not None:
        return recipe.train.steps
    pairs = sum(min(rows.get(source.name, 0), source.cap or rows.get(source.name, 0)) for source in recipe.data.sources)
    if not pairs:
        raise DataError(f"{recipe.data.root}: not there, and train.epochs needs the number of its rows; give train.steps")
    return max(1, int(pairs / (recipe.train.global_batch * recipe.train.accumulate) * (recipe.train.epochs or 0)))


def _draws(shares: Sequence[float], pairs: int, block: int) -> Iterator[list[int]]:
    """Sources of the pairs of some batches: in proportion where they are mixed, else block by block, spread evenly over the run."""
    total, bounds = sum(shares), list[float]()
    for share in shares:
        bounds.append((bounds[-1] if bounds else 0.0) + share / total)
    if not block:
        yield [_at(bounds, (index + 0.5) / pairs) for index in range(pairs)]
        return
    each = math.ceil(pairs / block)
    batches = math.ceil(BLOCKS / each)
    places = sorted(range(each * batches), key=lambda number: number * GOLDEN % 1)
    sources = [_at(bounds, (place + 0.5) / len(places)) for place in places]
    for start in range(0, len(sources), each):
        yield [source for source in sources[start : start + each] for _ in range(block)][:pairs]


def _at(bounds: Sequence[float], place: float) -> int:
    return next((index for index, bound in enumerate(bounds) if place < bound), len(bounds) - 1)
