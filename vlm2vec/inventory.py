"""What a model is made of, for arithmetic: its stacks of matrix products and its parameters by part, read off the modules.

The modules may lie on the device "meta", where a model of any size takes no memory and no time; their names and shapes are all that counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlm2vec.backbones.base import Backbone
from vlm2vec.config import Recipe
from vlm2vec.flops import Attention, Linear, Op, PerPicture, Stack
from vlm2vec.lora import target_patterns

PARTS = ("vision", "projector", "language")
# Last name components of the layers that make queries, keys and values; the layer after them reads what attention gives.
QUERIES = {"q_proj", "k_proj", "v_proj", "qkv_proj", "qkv", "query", "key", "value", "query_key_value", "c_attn", "q", "k", "v"}
CLASS_TOKENS = ("class_embedding", "cls_token")
BIDIRECTIONAL = ("bert",)  # model types whose text attends to both sides
Weighted = nn.Linear | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Parameters:
    """Counts of one part: all, those trained in full, and those of its adapter."""

    total: int
    trained: int
    adapter: int


@dataclass(frozen=True)
class Inventory:
    """A model as a recipe trains it. `sharded`: parameters in the layers and the token table of the language model; `tower_outputs`: how
    many tensors of states the vision tower gives, of which a replay keeps all; `crossing`: layers of the language model read pictures
    across, which is not counted right.
    """

    stacks: tuple[Stack, ...]
    parameters: dict[str, Parameters]
    extra: int
    patch: int
    hidden: int
    layers: int
    sharded: int
    largest_layer: int
    tower_outputs: int
    crossing: bool

    @property
    def total(self) -> int:
        """Parameters of the base model."""
        return sum(count.total for count in self.parameters.values())

    @property
    def trained(self) -> int:
        """Parameters that are trained, adapters included."""
        return sum(count.trained + count.adapter for count in self.parameters.values())

    @property
    def adapter(self) -> int:
        """Parameters of the adapter."""
        return sum(count.adapter for count in self.parameters.values())


def take(backbone: Backbone, recipe: Recipe) -> Inventory:
    """Read `backbone`, which has no adapter yet, as `recipe` trains it. Raises RecipeError if an adapter's targets do not exist."""
    reader = _Reader(backbone, recipe)
    stacks = tuple(Stack(part, tuple(reader.ops(part)), part in reader.replayed, reader.entry(part)) for part in PARTS)
    layers = reader.layers()
    sizes = [_count(layer) for layer in layers]
    tokens = backbone.model.get_input_embeddings().weight.numel()
    config = backbone.model.config
    vision: Any = getattr(config, "vision_config", None)
    return Inventory(
        stacks=stacks,
        parameters=reader.parameters(stacks),
        extra=int(any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in backbone.model.named_parameters())),
        patch=_edge(getattr(vision, "patch_size", 0)),
        hidden=backbone.hidden_size,
        layers=len(layers),
        sharded=sum(sizes) + tokens,
        largest_layer=max([*sizes, 0]),
        tower_outputs=1 + vision.num_hidden_layers if hasattr(config, "vision_feature_layer") else 1,
        crossing=any("cross_attn" in name for name, _ in backbone.model.named_parameters()),
    )


class _Reader:
    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        self.backbone, self.recipe = backbone, recipe
        self.model, self.lora = backbone.model, recipe.lora
        self.pattern, self.beyond = target_patterns(backbone, self.lora.parts, self.lora.targets) if self.lora else ("", None)
        self.replayed = self._replayed()
        self.narrowed = self._narrowed()

    def adapted(self, name: str, module: nn.Module) -> bool:
        """Whether the layer gets an adapter."""
        chosen = isinstance(module, nn.Linear) and bool(self.pattern) and re.fullmatch(self.pattern, name)
        return bool(chosen) and not (self.beyond and re.fullmatch(self.beyond, name))

    def ops(self, part: str) -> Iterator[Op]:
        """The matrix products of a part in the order in which they run."""
        layers = self._weighted(part)
        if any(not _is_patching(module) for _, module in layers if not isinstance(module, nn.Linear)):
            yield PerPicture(self._by_running(), part in self.recipe.model.train)
            return
        merge = self._merge(layers) if part == "projector" else 1.0
        last = {_block(name): name for name, _ in layers}
        reads, before = 0, ""
        for name, module in layers:
            inputs, outputs = _sizes(module)
            after_queries = _makes_queries(before) and not _makes_queries(name)
            if after_queries:
                yield self._attention(inputs, name, part)
            reads += not _read_together(before, name)
            role = "query" if _makes_queries(name) else "out" if after_queries else "down" if name == last[_block(name)] else "up"
            yield self._linear(name, module, part, Linear(inputs, outputs, reads, merge, block=_block(name), role=role))
            before = name

    def _attention(self, width: int, name: str, part: str) -> Attention:
        config = self.model.config.get_text_config() if part == "language" else getattr(self.model.config, "vision_config", None)
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1
        kernel = self.recipe.model.attention
        masked, fused = kernel != "packed", 2.0 if kernel == "eager" else 2.5
        return Attention(width, heads, self._window(name), self._causal(part), masked, fused, _block(name), self._read(name))

    def _linear(self, name: str, module: nn.Module, part: str, op: Linear) -> Linear:
        last = op.block == self.narrowed and op.role in ("up", "down")
        op = replace(op, trained=part in self.recipe.model.train, read=self._read(name), last=last)
        if self.lora is None or not self.adapted(name, module):
            return op
        return replace(op, rank=self.lora.rank, dora=self.lora.dora, dropout=self.lora.dropout > 0)

    def _narrowed(self) -> str | None:
        """The layer of the language model whose MLP runs at the last token of each item alone, None if all run at every token."""
        if self.recipe.model.pooling != "last" or not self.backbone.narrows:
            return None
        return _block(self._weighted("language")[-1][0])

    def entry(self, part: str) -> bool:
        """Whether the part is trained and holds something in front of its first product: a token table, a norm."""
        names = [name for name, _ in self.model.named_parameters() if self.backbone.part_of(name) == part]
        layers = self._weighted(part)
        return part != "vision" and part in self.recipe.model.train and bool(names and layers) and not names[0].startswith(layers[0][0])

    def _weighted(self, part: str) -> list[tuple[str, Any]]:
        """The layers of a part that hold a matrix, in the order in which they run: of one attention, queries before outputs."""
        found = [(name, module) for name, module in self.model.named_modules() if isinstance(module, Weighted) and self._part(name) == part]
        place = {name: found.index((name, module)) for name, module in found}
        first: dict[str, int] = {}
        for name, _ in found:
            first.setdefault(name.rpartition(".")[0], place[name])
        key = {name: (first[name.rpartition(".")[0]], not _makes_queries(name), place[name]) for name in place}
        return sorted(found, key=lambda entry: key[entry[0]])

    def layers(self) -> list[nn.Module]:
        """The layers of the language model: its longest list of modules."""
        lists = [module for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList) and self._reads(name, module)]
        return list(lists[max(range(len(lists)), key=lambda at: _count(lists[at]))]) if lists else []

    def _reads(self, prefix: str, module: nn.Module) -> bool:
        """Whether a module belongs to the language model, with all its weights."""
        names = [name for name, _ in module.named_parameters(prefix)]
        return bool(names) and all(self._part(name) == "language" for name in names)

    def parameters(self, stacks: tuple[Stack, ...]) -> dict[str, Parameters]:
        """Counts by part, the head among them."""
        found: dict[str, Parameters] = {}
        by_part = {stack.part: sum(_adapter(op) for op in stack.ops) for stack in stacks}
        for part in (*PARTS, "head"):
            total = sum(weight.numel() for name, weight in self.model.named_parameters() if self.backbone.part_of(name) == part)
            found[part] = Parameters(total, total * (part in self.recipe.model.train), by_part.get(part, 0))
        return found

    def _part(self, name: str) -> str:
        return self.backbone.part_of(name) if name else "head"

    def _replayed(self) -> set[str]:
        """Parts whose modules a step runs once: towers in front of the first trained one, whole."""
        learning = {name for name, module in self.model.named_modules() if self.adapted(name, module)} if self.lora else set()
        names = {id(module): name for name, module in self.model.named_modules()}
        parts: set[str] = set()
        for tower in self.backbone.towers():
            prefix = names[id(tower)]
            inside = {self._part(f"{prefix}.{name}") for name, _ in tower.named_parameters()}
            if inside & {*self.recipe.model.train} or any(name.startswith(prefix) for name in learning):
                break
            parts |= inside
        return parts

    def _merge(self, layers: list[tuple[str, Any]]) -> float:
        """Rows of the projector per row of the tower: how many patches its first layer takes together."""
        width = self._vision_width()
        return min(1.0, width / _sizes(layers[0][1])[0]) if layers and width else 1.0

    def _vision_width(self) -> int:
        weights = [module for name, module in self.model.named_modules() if isinstance(module, nn.Linear) and self._part(name) == "vision"]
        return weights[0].in_features if weights else 0

    def _window(self, name: str) -> int:
        """Edge of the attention window of a vision layer in patches, 0 if it sees the whole picture."""
        config: Any = getattr(self.model.config, "vision_config", None)
        number = re.search(r"\.(\d+)\.", name)
        pixels, whole = getattr(config, "window_size", 0) or 0, getattr(config, "fullatt_block_indexes", None)
        if self._part(name) != "vision" or not pixels or whole is None or number is None or int(number[1]) in whole:
            return 0
        return int(pixels // config.patch_size)

    def _read(self, name: str) -> bool:
        """Whether anything reads what a layer gives: some models take the output of an earlier layer of their vision tower."""
        config, number = self.model.config, re.search(r"\.layers\.(\d+)\.", name)
        last = getattr(config, "vision_feature_layer", None)
        if self._part(name) != "vision" or number is None or not isinstance(last, int) or last >= 0:
            return True
        return int(number[1]) <= config.vision_config.num_hidden_layers + last

    def _causal(self, part: str) -> bool:
        return part == "language" and self.model.config.get_text_config().model_type not in BIDIRECTIONAL

    def _by_running(self) -> int:
        """Operations of one picture in a convolutional tower, counted by running it without data."""
        tower, edge = self.backbone.towers()[0], self.model.config.image_size
        device = next(tower.parameters()).device
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(torch.empty(1, 3, edge, edge, device=device, dtype=next(tower.parameters()).dtype))
        return counter.get_total_flops()


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _edge(size: Any) -> int:
    """One edge of a square that a configuration gives as a number or a pair; 0 for none."""
    return int(size[0]) if isinstance(size, list | tuple) else int(size or 0)


def _sizes(module: Any) -> tuple[int, int]:
    outputs = module.weight.shape[0]
    return module.weight.numel() // outputs, outputs


def _makes_queries(name: str) -> bool:
    return name.rpartition(".")[2] in QUERIES


def _is_patching(module: Any) -> bool:
    """Whether a convolution only turns patches into vectors."""
    return tuple(module.kernel_size) == tuple(module.stride) and module.groups == 1 and math.prod(module.kernel_size) > 1


def _read_together(before: str, name: str) -> bool:
    """Whether two layers that follow each other read one tensor: queries, keys and values, or the gate of an MLP and its companion."""
    if before.rpartition(".")[0] != name.rpartition(".")[0]:
        return False
    last, here = before.rpartition(".")[2], name.rpartition(".")[2]
    return (_makes_queries(before) and _makes_queries(name)) or (last, here) == ("gate_proj", "up_proj")


def _block(name: str) -> str:
    """The numbered layer of a tower that a name belongs to, whose activations checkpointing drops; "" outside of all."""
    found = re.match(r"(.*\.\d+)\.", name)
    return found[1] if found else ""


def _adapter(op: Op) -> int:
    if not isinstance(op, Linear) or not op.rank:
        return 0
    return op.rank * (op.inputs + op.outputs) + op.outputs * op.dora
