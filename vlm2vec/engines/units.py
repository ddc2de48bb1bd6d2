"""Which parts of a model may be spread over ranks: those that every chunk runs, whatever its items hold.

Ranks meet whenever a spread part runs, to put its weights together. A chunk of text runs no vision tower and no projector, and in some
families not even every layer of the language model; were such a part spread, a rank with text would keep a rank with pictures waiting for
ever. What runs is measured with one chunk of text. The rest, usually a tenth of the weights, stays whole on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm2vec.encoder import Encoder
from vlm2vec.errors import RecipeError


@dataclass(frozen=True)
class Units:
    """`parts`: the layers of the language model and its table of tokens. `root`: the module whose forward runs them all; or None."""

    parts: list[nn.Module]
    root: nn.Module | None


def find_units(encoder: Encoder) -> Units:
    """What to spread. Layers are the largest list of modules of the language model; of them those that text alone runs, once each."""
    calls = _calls_of_text(encoder)
    times = Counter(id(module) for module in calls)
    lists = [
        module for name, module in encoder.model.named_modules() if isinstance(module, nn.ModuleList) and _reads(encoder, name, module)
    ]
    tokens = encoder.model.get_input_embeddings()
    candidates = [*max(lists, key=_size, default=nn.ModuleList()), tokens]
    parts = [module for module in candidates if times[id(module)] == 1]
    inside = {id(part) for part in parts}
    root = next((module for module in calls if inside <= {id(part) for part in module.modules()}), None)
    return Units(parts, root)


def check_backward(encoder: Encoder, units: Units, engine: str) -> None:
    """Raise RecipeError unless every chunk goes back through the same layers, whatever its items hold: there the ranks meet too.

    A layer with a trained weight always takes part. One without takes part only in chunks where something in front of it is trained.
    """
    layers = [part for part in units.parts if not isinstance(part, nn.Embedding)]
    idle = [layer for layer in layers if not any(parameter.requires_grad for parameter in layer.parameters())]
    inside = {id(parameter) for part in units.parts for parameter in part.parameters()}
    others = any(parameter.requires_grad and id(parameter) not in inside for parameter in encoder.model.parameters())
    if len(idle) == len(layers) or (idle and others):
        raise RecipeError(
            f"train.engine: {engine} spreads the layers of the language model, and {len(idle)} of {len(layers)} have nothing to train, so "
            "text and pictures would go back through different ones; add language to model.train or lora.parts, or take ddp, zero1 or zero2"
        )


def _reads(encoder: Encoder, prefix: str, module: nn.Module) -> bool:
    """Whether a module belongs to the language model, with all its weights."""
    names = [name for name, _ in module.named_parameters(prefix)]
    return bool(names) and all(encoder.backbone.part_of(name) == "language" for name in names)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _calls_of_text(encoder: Encoder) -> list[nn.Module]:
    """The modules that a chunk of one text runs, in the order in which they start, once per run."""
    features = encoder.processor.features("a", [])
    calls: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in encoder.model.modules()]
    try:
        with torch.no_grad():
            encoder.embed({name: tensor.to(encoder.device) for name, tensor in encoder.processor.collate([features]).items()})
    finally:
        for handle in handles:
            handle.remove()
    return calls


Owners = dict[int, list[tuple[nn.Module, str]]]


def owners(model: nn.Module) -> Owners:
    """By the identity of a parameter, every (module, attribute) that holds it: several where weights are tied."""
    found: Owners = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def retie(before: Owners) -> None:
    """Give parameters that were one and that sharding replaced in one place the new one in all."""
    for old, places in before.items():
        new = next((parameter for module, name in places if id(parameter := module._parameters[name]) != old), None)
        for module, name in places if new is not None else ():
            module._parameters[name] = new


@contextmanager
def exchanged(model: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Inside, the parameters with these identities are ordinary ones that hold `tensors`."""
    places = [(module, name, module._parameters[name]) for key, held in owners(model).items() if key in tensors for module, name in held]
    fresh = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}
    for module, name, parameter in places:
        fresh[id(parameter)].requires_grad = bool(parameter is not None and parameter.requires_grad)
        module._parameters[name] = fresh[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
