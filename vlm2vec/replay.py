"""Run frozen modules once per chunk and step, although GradCache encodes each chunk twice.

A vision tower without trainable parameters gives the same features in both passes, and neither pass needs a gradient through it. `Replay`
puts a recorder in front of such modules: the first time a chunk is encoded their outputs are kept, the second time they are handed out
again, bit for bit.

    with replay:                      # one step; the recorded outputs are dropped when it ends, however it ends
        with replay.chunk(index):     # inside the encode function
            encoder.embed(batch)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from vlm2vec.errors import Vlm2VecError


@dataclass(frozen=True)
class _Recorded:
    """An output and the in-place version of each of its tensors when it was recorded."""

    output: Any
    versions: tuple[int, ...]


class Replay:
    """Context manager of one step over `modules`, none of which may hold a trainable parameter; `runs[i]` counts real runs of module i.

    At most `limit` bytes of outputs are `held`; what would be more is computed in both passes.

    A module may run several times in one chunk: the n-th call of the second visit gets the output of the n-th call of the first. A key must
    therefore name the same items throughout a step. Outside `chunk` the modules run as usual. Outputs are tensors, or tuples, lists and
    mappings (transformers' ModelOutput among them) of such.

    Raises Vlm2VecError if a module could not be replayed without changing the gradient: it has a trainable parameter, is in training mode
    (its dropout would draw from the random stream in one pass only), gets an input that needs a gradient, or its recorded output was
    changed in place.
    """

    def __init__(self, modules: Sequence[nn.Module], limit: float = math.inf) -> None:
        for index, module in enumerate(modules):
            trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
            if trainable:
                raise Vlm2VecError(f"{_named(index, module)}: {len(trainable)} trainable parameters, e.g. {trainable[0]!r}")
        self.modules = list(modules)
        self.limit, self.held = limit, 0
        self.runs = [0] * len(self.modules)
        self._recorded: dict[tuple[Hashable, int, int], _Recorded] = {}
        self._chunk: tuple[Hashable] | None = None
        self._calls = [0] * len(self.modules)  # of each module in the current chunk
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> Replay:
        for index, module in enumerate(self.modules):
            training = [name for name, part in module.named_modules() if part.training]
            if training:
                raise Vlm2VecError(f"{_named(index, module)}: {training[0] or 'it'!r} is in training mode; call eval() on it")
        for index, module in enumerate(self.modules):
            self._patch(index, module)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._restore:
            self._restore.pop()()
        self._recorded.clear()
        self.held = 0

    @contextmanager
    def chunk(self, key: Hashable) -> Iterator[None]:
        """Everything the modules compute inside belongs to the chunk `key`."""
        self._chunk = (key,)
        self._calls = [0] * len(self.modules)
        try:
            yield
        finally:
            self._chunk = None

    def _patch(self, index: int, module: nn.Module) -> None:
        """Shadow the forward of `module` on the instance, so that its hooks still run."""
        real = module.forward
        patched_before = "forward" in vars(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(index, real, args, kwargs)

        def restore() -> None:
            if patched_before:
                module.forward = real
            else:
                del module.forward

        module.forward = forward
        self._restore.append(restore)

    def _call(self, index: int, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
            module = self.modules[index]
            raise Vlm2VecError(
                f"{_named(index, module)}: its input needs a gradient; replay only modules in front of the first trained one"
            )
        if self._chunk is None:
            self.runs[index] += 1
            return real(*args, **kwargs)
        key = (self._chunk, index, self._calls[index])
        self._calls[index] += 1
        if key not in self._recorded:
            self.runs[index] += 1
            output = _detached(real(*args, **kwargs))
            size = sum(tensor.nbytes for tensor in _tensors(output))
            if self.held + size > self.limit:
                return output
            self.held += size
            self._recorded[key] = _Recorded(output, _versions(output))
        recorded = self._recorded[key]
        if _versions(recorded.output) != recorded.versions:
            raise Vlm2VecError(f"{_named(index, self.modules[index])}: its output was changed in place after it was recorded")
        return _detached(recorded.output)


def _named(index: int, module: nn.Module) -> str:
    return f"cannot replay module {index} ({type(module).__name__})"


def leading_frozen(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules in front of the first that has a trainable parameter; `modules` are in the order the data flows through them."""
    return list(takewhile(lambda module: not any(parameter.requires_grad for parameter in module.parameters()), modules))


def _detached(value: Any) -> Any:
    """The same structure in new containers, its tensors sharing memory: the receiver may put other tensors into a container."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        fresh: Any = copy.copy(value)
        for key in value:
            fresh[key] = _detached(value[key])
        return fresh
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_detached, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_detached, value))
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _versions(value: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(value))
