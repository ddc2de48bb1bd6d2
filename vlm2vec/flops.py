"""Floating-point operations of a training step, from sizes alone: matrix products count 2 per multiply-add, all else is left out.

A model is a row of stacks (vision, projector, language), a stack the matrix products it makes, in order. What a step adds up to follows
from who is trained: a weight that is frozen gets no gradient, and nothing in front of the first trained weight is gone back through.

Two counts are made. `useful` is the floor: each distinct item once forward and once backward through what is trained, once forward through
what is frozen, causal attention over the lower triangle alone, no padding. `done` is what this library runs: padded chunks, the second pass
of GradCache (Gao et al. 2021, arXiv 2101.06983) over chunks that do not keep their graph, frozen towers once because their outputs are
replayed, recomputed activations, whole score matrices under a mask, and what an implementation of DoRA computes twice. Packed chunks have
no padding and no mask: there causal attention is its lower triangle in both counts. Products that run at the last token of each item alone
(`backbones/last_layer`) count so in both.

Shape letters: C items in a chunk, L tokens; a grid (height, width) counts the patches that attend to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Grid = tuple[int, int]  # a text of L tokens is (1, L)


@dataclass(frozen=True)
class Linear:
    """A weight matrix applied to rows: `rows` is how many of them per row of its stack (1/4 behind a merger of 2 x 2 patches).

    `reads` numbers the tensor it reads: layers with equal numbers share it. `rank` > 0 is a LoRA adapter (arXiv 2106.09685), behind
    `dropout` or not, and with the magnitudes of DoRA (arXiv 2402.09353) or not. `block` names the layer of the tower that it belongs to,
    whose activations may be recomputed, and `role` its place there: query (keys and values too), out, up (the gate too) or down. What is
    not `read` is computed forward and in vain. `last`: applied to the last token of each item alone, as `backbones/last_layer` does.
    """

    inputs: int
    outputs: int
    reads: int = 0
    rows: float = 1.0
    trained: bool = False
    rank: int = 0
    dora: bool = False
    dropout: bool = False
    block: str = ""
    role: str = ""
    read: bool = True
    last: bool = False

    @property
    def learns(self) -> bool:
        """Whether a gradient ends here."""
        return self.trained or self.rank > 0


@dataclass(frozen=True)
class Attention:
    """Scores and their product with the values, `heads` together `width` wide; each patch sees `window` x `window`, 0: all.

    `backward` is its cost over that of the forward: 2, or 2.5 in fused kernels, which make the scores again (Dao et al. 2022,
    arXiv 2205.14135). `masked`: causality is a mask over all scores, rather than a kernel that leaves out what it hides.
    """

    width: int
    heads: int = 1
    window: int = 0
    causal: bool = False
    masked: bool = True
    backward: float = 2.5
    block: str = ""
    read: bool = True


@dataclass(frozen=True)
class PerPicture:
    """A tower that is no transformer: operations of one picture, counted elsewhere; twice as many backward if it is trained."""

    forward: int
    trained: bool = False


Op = Linear | Attention | PerPicture


@dataclass(frozen=True)
class Load:
    """What a stack is given: grids of patches (or texts) and how often each occurs; `extra` rows beside each grid (a class token)."""

    grids: Mapping[Grid, int]
    extra: int = 0
    pictures: int = 0

    @cached_property
    def rows(self) -> int:
        """Rows that every linear layer sees."""
        return sum(count * (height * width + self.extra) for (height, width), count in self.grids.items())

    @cached_property
    def items(self) -> int:
        """Grids, or texts."""
        return sum(self.grids.values())

    def pairs(self, window: int = 0) -> int:
        """Query-key pairs of one head: squares of the lengths, or of the windows that a grid falls into."""
        if not window:
            return sum(count * (height * width + self.extra) ** 2 for (height, width), count in self.grids.items())
        return sum(count * _squares(height, window) * _squares(width, window) for (height, width), count in self.grids.items())

    def causal_pairs(self) -> int:
        """Those on or below the diagonal."""
        return (self.pairs() + self.rows) // 2


def _squares(length: int, window: int) -> int:
    """Sum of the squares of `length` cut into windows."""
    return length // window * window**2 + (length % window) ** 2


@dataclass(frozen=True)
class Cost:
    """Operations of one pass: forward, backward to the inputs, backward to the weights, and forward of what may be recomputed."""

    forward: float = 0.0
    to_inputs: float = 0.0
    to_weights: float = 0.0
    blocks: float = 0.0

    @property
    def backward(self) -> float:
        return self.to_inputs + self.to_weights

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward, self.to_inputs + other.to_inputs, self.to_weights + other.to_weights, self.blocks + other.blocks
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.forward * times, self.to_inputs * times, self.to_weights * times, self.blocks * times)


@dataclass
class _Rates:
    """A stack's cost per row, per item, per query-key pair (by window, and whether the lower triangle alone counts), per picture, and per
    pass.
    """

    row: Cost = Cost()
    item: Cost = Cost()
    picture: Cost = Cost()
    once: Cost = Cost()
    pairs: dict[tuple[int, bool], Cost] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stack:
    """One part of a model. `replayed`: frozen, with everything in front of it, so that a step runs it once. `entry`: something trained,
    such as a token table, lies in front of its first product. A stack equals itself alone: hashing hundreds of products takes long.
    """

    part: str
    ops: tuple[Op, ...]
    replayed: bool = False
    entry: bool = False

    @cached_property
    def learns(self) -> bool:
        """Whether anything in it is trained."""
        return any(op.trained if isinstance(op, PerPicture) else isinstance(op, Linear) and op.learns for op in self.ops)

    def cost(self, load: Load, behind: bool = False, lean: bool = False) -> Cost:
        """Operations over `load`. `behind`: something in front of the stack is trained. `lean`: only what the mathematics needs."""
        rates = self._rates[behind or self.entry, lean]
        total = rates.row * load.rows + rates.item * load.items + rates.picture * load.pictures + rates.once
        for (window, triangle), each in rates.pairs.items():
            total += each * (load.causal_pairs() if triangle else load.pairs(window))
        return total

    @cached_property
    def _rates(self) -> dict[tuple[bool, bool], _Rates]:
        """By `behind` and `lean`: one walk over the products serves every load."""
        return {(behind, lean): self._walk(behind, lean) for behind in (False, True) for lean in (False, True)}

    def _walk(self, needs: bool, lean: bool) -> _Rates:
        rates, reads = _Rates(), dict[int, bool]()
        for op in self.ops:
            if isinstance(op, Linear):
                needed = reads.setdefault(op.reads, needs)  # whether the tensor that it reads needs a gradient
                if op.last:
                    rates.item += _linear(op, needed, lean)
                else:
                    rates.row += _linear(op, needed, lean)
                rates.once += _norm(op) if not lean else Cost()
                needs = needs or op.learns
            elif isinstance(op, Attention):
                kind = (op.window, op.causal and (lean or not op.masked))
                rates.pairs[kind] = rates.pairs.get(kind, Cost()) + _attention(op, needs, lean)
            else:
                rates.picture += Cost(op.forward, 0.0, 2.0 * op.forward * op.trained)
                needs = needs or op.trained
        return rates


def _linear(op: Linear, needed: bool, lean: bool) -> Cost:
    """Per row of the stack that the product is applied to."""
    product = 2.0 * op.rows * op.inputs * op.outputs
    down, up = 2.0 * op.rows * op.inputs * op.rank, 2.0 * op.rows * op.outputs * op.rank
    copies = 2 if op.dora and op.dropout and not lean else 1  # the frozen product of the dropped input too
    forward = copies * product + down + up
    to_inputs = (copies * product + down) * needed + up  # the adapter's inner gradient is needed always
    to_weights = product * op.trained + down + up
    return Cost(forward, to_inputs * op.read, to_weights * op.read, forward * bool(op.block))


def _norm(op: Linear) -> Cost:
    """Per pass: DoRA multiplies both factors of an adapter, through the unit matrix, to know the norms of the sum."""
    forward = 2.0 * op.inputs * op.rank * (op.inputs + op.outputs) * op.dora
    return Cost(forward, 0.0, 0.0, forward * bool(op.block))


def _attention(op: Attention, needed: bool, lean: bool) -> Cost:
    """Per query-key pair."""
    forward = 4.0 * op.width
    return Cost(forward, (2.0 if lean else op.backward) * forward * needed * op.read, 0.0, forward * bool(op.block))


@dataclass(frozen=True)
class Chunk:
    """What is encoded at once: token counts of its items, and the grids of their pictures. `packed`: nothing is padded."""

    lengths: tuple[int, ...]
    grids: Mapping[Grid, int] = field(default_factory=dict)
    pictures: int = 0
    packed: bool = False

    @property
    def padded(self) -> int:
        """Tokens with padding, where there is any."""
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)

    def load(self, part: str, extra: int, padded: bool) -> Load:
        """What the stack of `part` is given."""
        if part != "language":
            return Load(self.grids, extra * (part == "vision"), self.pictures)
        if padded and not self.packed:
            return Load({(1, max(self.lengths)): len(self.lengths)})
        texts: dict[Grid, int] = {}
        for length in self.lengths:
            texts[1, length] = texts.get((1, length), 0) + 1
        return Load(texts)


@dataclass(frozen=True)
class Passes:
    """How a step treats a chunk."""

    kept: bool = False  # its graph stays from the first pass
    checkpointing: bool = False


def chunk_cost(stacks: Sequence[Stack], chunk: Chunk, extra: int, passes: Passes, lean: bool = False) -> dict[str, float]:
    """Operations of a chunk in a step by part. `lean` counts what is useful, and then `passes` does not matter."""
    found, behind = {}, False
    for stack in stacks:
        if stack.part != "language" and not chunk.pictures:
            found[stack.part] = 0.0
            continue
        cost = stack.cost(chunk.load(stack.part, extra, padded=not lean), behind, lean)
        behind = behind or stack.learns
        forwards = 1 if lean or passes.kept or stack.replayed else 2
        again = cost.blocks if passes.checkpointing and behind and not lean else 0.0
        found[stack.part] = forwards * cost.forward + (cost.backward + again if behind else 0.0)
    return found


def step_cost(stacks: Sequence[Stack], chunks: Iterable[Chunk], extra: int, kept: int = 0, checkpointing: bool = False) -> dict[str, float]:
    """Operations of a step over `chunks`, the first `kept` of which keep their graph, by part."""
    return _sum(chunk_cost(stacks, chunk, extra, Passes(index < kept, checkpointing)) for index, chunk in enumerate(chunks))


def useful_cost(stacks: Sequence[Stack], chunks: Iterable[Chunk], extra: int) -> dict[str, float]:
    """The floor of the same step by part."""
    return _sum(chunk_cost(stacks, chunk, extra, Passes(), lean=True) for chunk in chunks)


def _sum(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for table in tables:
        for part, value in table.items():
            total[part] = total.get(part, 0.0) + value
    return total
