"""Bytes that a training step holds on one device, from sizes alone.

What autograd keeps of a layer is counted tensor by tensor, as eager torch keeps it: inputs of products that learn, both sides of the gate,
float32 copies in norms, queries, keys, values and outputs of attention, and the copies of weights that autocast makes. Korthikanti et al.
2022 (arXiv 2205.05198, equation 1) count the same for a fully trained layer in 16 bits; adapters change it in both directions.

A row is a padded token, or a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from vlm2vec.flops import Attention, Linear, Op, Stack

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Numbers:
    """Bytes of a `stored` weight, of a `computed` activation and of an element of a dropout `mask`: 1 on a GPU, 4 on a CPU."""

    stored: int = 2
    computed: int = 2
    attention: str = "sdpa"
    mask: int = 1

    @property
    def casts(self) -> bool:
        """Whether autocast copies weights to a narrower format."""
        return self.computed < self.stored


@dataclass(frozen=True)
class Held:
    """Bytes kept per row, and once per chunk."""

    row: float = 0.0
    once: float = 0.0

    def __add__(self, other: Held) -> Held:
        return Held(self.row + other.row, self.once + other.once)

    def over(self, rows: float) -> float:
        """Bytes over so many rows."""
        return self.row * rows + self.once


def layer(ops: Sequence[Op], length: int, numbers: Numbers) -> Held:
    """What autograd keeps of one layer that a gradient passes. `length`: tokens of the longest item, on which scores depend; one of them is
    its last.
    """
    linears = [op for op in ops if isinstance(op, Linear)]
    total = sum((_attention(op, length, numbers) for op in ops if isinstance(op, Attention)), Held())
    for _, members in groupby(linears, key=lambda op: op.reads):
        group = list(members)
        held = _group(group, numbers) + Held(_activation(group, numbers))
        total += Held(held.row / length, held.once) if group[0].last else held
    return total


def _group(group: list[Linear], numbers: Numbers) -> Held:
    """Products of one tensor: that tensor, as often as it is kept, the norm that made it, and what adapters add."""
    first, computed = group[0], numbers.computed
    adapted = [op for op in group if op.rank]
    # an adapter is float32 and casts what it reads, so that autocast makes it a copy of its own; dropout makes one too
    copies = len(adapted) if any(computed < 4 or op.dropout for op in adapted) else int(bool(adapted) and first.role != "out")
    copies += first.trained and first.role != "out"  # what attention gives is kept by attention
    norm = (4 + numbers.stored * first.trained) * first.inputs if first.role in ("query", "up") else 0
    masks = sum(numbers.mask * op.inputs * op.dropout for op in adapted)
    magnitudes = sum(2 * computed * op.outputs for op in adapted if op.dora)
    cast = sum(2 * op.inputs * op.outputs * (numbers.casts + (op.dora and op.dropout and computed < 4)) for op in group)
    return Held(copies * computed * first.inputs + norm + masks + magnitudes, cast)


def _activation(group: list[Linear], numbers: Numbers) -> float:
    """Around the activation of an MLP: the gate before and after it and the other side, or its input where there is no gate."""
    if group[0].role != "up":
        return 0.0
    gated = len(group) == 2
    return numbers.computed * group[0].outputs * (3 if gated else 1)


def _attention(op: Attention, length: int, numbers: Numbers) -> Held:
    """Queries, keys repeated for all heads, values and outputs; the mask, or all probabilities where no fused kernel runs."""
    states = 4 * numbers.computed * op.width
    if numbers.attention == "eager":
        return Held(states + op.heads * length * (4 + numbers.computed * (numbers.computed < 4)))
    return Held(states + numbers.computed * length * (numbers.attention == "sdpa"))


def activations(stack: Stack, rows: float, length: int, numbers: Numbers, behind: bool, checkpointing: bool = False) -> float:
    """Bytes that autograd keeps of a stack over a chunk; with checkpointing the input of each layer, and all of the largest."""
    whole, inputs, largest = _layers(stack, length, numbers, behind)
    return rows * inputs + largest.over(rows) if checkpointing else whole.over(rows)


@lru_cache(maxsize=4096)
def _layers(stack: Stack, length: int, numbers: Numbers, behind: bool) -> tuple[Held, float, Held]:
    """What is kept of all layers, of their inputs (per row of the stack), and of the largest layer."""
    whole, inputs, largest, needs = Held(), 0.0, Held(), behind or stack.entry
    for _, members in groupby((op for op in stack.ops if isinstance(op, Linear | Attention)), key=lambda op: op.block):
        ops = list(members)
        needs = needs or any(isinstance(op, Linear) and op.learns for op in ops)
        if needs:
            held = layer(ops, length, numbers)
            held = Held(held.row * _rows(ops), held.once)
            inputs += numbers.computed * _width(ops) * _rows(ops)
            whole, largest = whole + held, max(largest, held, key=lambda one: one.row)
    return whole, inputs, largest


def _rows(ops: Sequence[Op]) -> float:
    return next((op.rows for op in ops if isinstance(op, Linear)), 1.0)


def _width(ops: Sequence[Op]) -> int:
    return next((op.inputs for op in ops if isinstance(op, Linear)), 0)


def scratch(stack: Stack, rows: float, length: int, numbers: Numbers) -> float:
    """The largest temporaries of a stack: three tensors of its widest product, scores in float32 without a fused kernel, and what DoRA
    makes of a weight (the unit matrix, and the adapter's product with it, in float32).
    """
    widest, heads, weight = _extremes(stack)
    scores = 2 * 4 * heads * length * rows if numbers.attention == "eager" else 0.0
    return max(3 * numbers.computed * widest * rows, scores, weight)


@lru_cache(maxsize=64)
def _extremes(stack: Stack) -> tuple[float, int, float]:
    """Of a stack's products the most numbers per row, the most heads, and the most bytes that DoRA makes of a weight."""
    linears = [op for op in stack.ops if isinstance(op, Linear)]
    return (
        max((max(op.inputs, op.outputs) * op.rows for op in linears), default=0),
        max((op.heads for op in stack.ops if isinstance(op, Attention)), default=0),
        max((6.0 * op.inputs**2 + 18.0 * op.inputs * op.outputs for op in linears if op.dora), default=0.0),
    )
