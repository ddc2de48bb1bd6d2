"""What a recipe costs on devices that are not at hand: operations, memory, time, and what bounds it.

From arithmetic: the operations of a step over the peak of the device times the share of it that is reached. That share is assumed unless it
is given (`mfu`), so times come with a range; operations and memory do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from vlm2vec.backbones.shapes import shape_of
from vlm2vec.budget import Budget
from vlm2vec.config import Recipe
from vlm2vec.data.mixture import Mixture
from vlm2vec.devices import Device, facts
from vlm2vec.errors import RecipeError
from vlm2vec.flops import Chunk, Linear, Stack, step_cost, useful_cost
from vlm2vec.footprint import WIDTH, Numbers, activations, scratch
from vlm2vec.inventory import Inventory, take
from vlm2vec.losses.info_nce import SCORES
from vlm2vec.workload import Looker, Workload, workload

SPREAD_OPTIMIZER = ("zero1", "zero2", "zero3", "fsdp2")
SPREAD_WEIGHTS = ("zero3", "fsdp2")
BOUNDS = {
    "products": "matrix products",
    "traffic": "memory bandwidth",
    "launches": "starting kernels",
    "exchange": "exchange between devices",
    "host": "decoding on the host",
}
TRIED, SMALLEST = 8192, 256  # tokens of the largest and smallest chunk that is looked at where the recipe leaves it open
TILES = 3  # of scores that the loss holds at once
WORTH = 0.03  # share of the operations that advice must save


@dataclass(frozen=True)
class Plan:
    """A recipe on `ranks` devices of one kind; `efficiency` is the share of the peak, its lower and upper end."""

    recipe: Recipe
    budget: Budget
    inventory: Inventory
    work: Workload
    device: Device
    ranks: int
    efficiency: tuple[float, float, float]
    model_source: str

    @property
    def numbers(self) -> Numbers:
        """Number formats."""
        computed = 2 if self.recipe.train.precision == "bf16" else WIDTH[self.recipe.model.dtype]
        return Numbers(WIDTH[self.recipe.model.dtype], computed, self.recipe.model.attention)

    @property
    def engine(self) -> str:
        """The engine that runs: one process needs none."""
        return (self.recipe.train.engine or "ddp") if self.ranks > 1 else "ddp"

    def cut(self, **changes: Any) -> Plan:
        """The same with other chunks."""
        return replace(self, budget=replace(self.budget, **changes))

    def under(self, engine: str) -> Plan:
        """The same with another engine."""
        return replace(self, recipe=replace(self.recipe, train=replace(self.recipe.train, engine=engine)))  # type: ignore[arg-type]

    def without_dropout(self) -> Plan:
        """The same without dropout in front of the adapters."""
        stacks = [
            replace(stack, ops=tuple(replace(op, dropout=False) if isinstance(op, Linear) else op for op in stack.ops))
            for stack in self.inventory.stacks
        ]
        return replace(self, inventory=replace(self.inventory, stacks=tuple(stacks)))


def plan(recipe: Recipe, device: Device, ranks: int, mfu: float | None = None, mixture: Mixture | None = None) -> Plan:
    """Look at the model and the items of a recipe, or at those of the `mixture` made of it.

    Raises RecipeError, ModelError or DataError for what cannot be known or shared.
    """
    if recipe.train.global_batch % ranks:
        raise RecipeError(f"train.global_batch ({recipe.train.global_batch}) is not divisible by {ranks} devices")
    shape = shape_of(recipe.model)
    inventory = take(shape.backbone, recipe)
    work = workload(recipe, shape, Looker(shape, inventory.patch), ranks, mixture)
    assumed = facts()["efficiency"]
    efficiency = (mfu, mfu, mfu) if mfu else (assumed["assumed"], assumed["low"], assumed["high"])
    train = recipe.train
    open_budget = Budget(train.chunk_tokens or TRIED, train.keep_tokens or 0, bool(train.activation_checkpointing))
    return _settled(Plan(recipe, open_budget, inventory, work, device, ranks, efficiency, shape.source))


def _settled(made: Plan) -> Plan:
    """What the recipe leaves open, about as a run settles it: chunks that leave room for graphs, up to TRIED tokens, and what fits then."""
    train = made.recipe.train
    if train.chunk_tokens is None:
        sizes = [made.cut(chunk_tokens=tokens) for tokens in _halves(TRIED)]
        made = next((other for share in (0.7, 1.0) for other in sizes if _fits(other, share)), made)
    if train.activation_checkpointing is None and not _fits(made):
        made = made.cut(activation_checkpointing=True)
    return made.cut(keep_tokens=_keep(made)) if train.keep_tokens is None else made


def _halves(tokens: int) -> Iterator[int]:
    """From `tokens` down to what is still worth starting a kernel for."""
    while tokens >= SMALLEST:
        yield tokens
        tokens //= 2


def _fits(made: Plan, share: float = 1.0) -> bool:
    return sum(memory(made).values()) <= share * 1e9 * made.device.memory


# -- operations


def kept_chunks(chunks: Sequence[Chunk], keep_tokens: int) -> int:
    """How many of the first chunks keep their graph: one does in any case."""
    return max(1, sum(padded <= keep_tokens for padded in accumulate(chunk.padded for chunk in chunks)))


def operations(made: Plan) -> dict[str, float]:
    """Per device and step: `useful`, `done`, `once` (done, were every graph kept), and done by part."""
    train, stacks, extra = made.recipe.train, made.inventory.stacks, made.inventory.extra
    batches = made.work.chunks(made.budget.chunk_tokens)
    share = train.accumulate / len(batches)
    total = {"useful": 0.0, "done": 0.0, "once": 0.0, **{stack.part: 0.0 for stack in stacks}}
    for chunks in batches:
        kept = kept_chunks(chunks, made.budget.keep_tokens)
        done = step_cost(stacks, chunks, extra, kept, made.budget.activation_checkpointing)
        total["useful"] += share * sum(useful_cost(stacks, chunks, extra).values())
        total["done"] += share * sum(done.values())
        total["once"] += share * sum(step_cost(stacks, chunks, extra, len(chunks)).values())
        for part, value in done.items():
            total[part] += share * value
    return total


# -- memory


def memory(made: Plan) -> dict[str, float]:
    """Bytes on one device by purpose, at the worst of the batches looked at."""
    found = made.inventory
    stored = made.numbers.stored
    trained = _trained_bytes(made)
    weights = float(found.total * stored + 4 * found.adapter)
    if made.engine in SPREAD_WEIGHTS:
        weights = (found.total - found.sharded * (1 - 1 / made.ranks) + 2 * found.largest_layer) * stored + 4 * found.adapter
    batches = made.work.chunks(made.budget.chunk_tokens)
    batch = made.recipe.train.global_batch
    table = {
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained / (made.ranks if made.engine in SPREAD_OPTIMIZER else 1),
        "activations": max(_activations(made, chunks) for chunks in batches),
        "replayed features": min(
            max(sum(_replayed(made, chunk) for chunk in chunks) for chunks in batches), made.recipe.train.replay_gib * 2**30
        ),
        "temporaries": max(_temporaries(made, chunk) for chunks in batches for chunk in chunks),
        "embeddings and scores": 4 * 4 * batch * found.hidden + 4 * TILES * min(SCORES, batch**2),
    }
    overhead = facts()["overhead"]
    return table | {"context and fragments": 1e9 * overhead["context"] + overhead["fragments"] * sum(table.values())}


def _trained_bytes(made: Plan) -> float:
    own = made.inventory.trained - made.inventory.adapter
    return float(4 * made.inventory.adapter + made.numbers.stored * own)


def _activations(made: Plan, chunks: Sequence[Chunk]) -> float:
    """What graphs hold: those kept, all at once, and later those of the others, one at a time."""
    each = [chunk_bytes(made, chunk) for chunk in chunks]
    kept = kept_chunks(chunks, made.budget.keep_tokens)
    return max(sum(each[:kept]), *each)


def chunk_bytes(made: Plan, chunk: Chunk) -> float:
    """What autograd keeps of one chunk."""
    total, behind = 0.0, False
    for stack in made.inventory.stacks:
        if stack.part != "language" and not chunk.pictures:
            continue
        load = chunk.load(stack.part, made.inventory.extra, padded=True)
        length = max((height * width for height, width in load.grids), default=0)
        total += activations(stack, load.rows, length, made.numbers, behind, made.budget.activation_checkpointing)
        behind = behind or stack.learns
    return total


def _replayed(made: Plan, chunk: Chunk) -> float:
    """Outputs of frozen towers, kept from the first pass to the second: what the projector reads, and what it gives."""
    projector = next(stack for stack in made.inventory.stacks if stack.part == "projector")
    parts = {stack.part for stack in made.inventory.stacks if stack.replayed}
    if not chunk.pictures or not parts:
        return 0.0
    rows = chunk.load("vision", made.inventory.extra, padded=True).rows
    linears = [op for op in projector.ops if isinstance(op, Linear)]
    read = rows * linears[0].rows * linears[0].inputs * made.inventory.tower_outputs
    given = sum(rows * op.rows * op.outputs for op in linears if op.outputs == made.inventory.hidden) * ("projector" in parts)
    return made.numbers.computed * (read + given)


def _temporaries(made: Plan, chunk: Chunk) -> float:
    stacks = made.inventory.stacks if chunk.pictures else made.inventory.stacks[-1:]
    return max(_scratch(made, stack, chunk) for stack in stacks)


def _scratch(made: Plan, stack: Stack, chunk: Chunk) -> float:
    load = chunk.load(stack.part, made.inventory.extra, padded=True)
    return scratch(stack, load.rows, max((height * width for height, width in load.grids), default=0), made.numbers)


# -- time


def times(made: Plan, done: float, useful: float) -> dict[str, float]:
    """Seconds of a step: its floor, and what products, memory traffic, the exchange and the host take; `step` and its range."""
    peak = made.device.peak(made.recipe.train.precision)
    rate = 1e12 * made.device.measured if made.device.measured and made.recipe.train.precision == "bf16" else peak
    found = {
        "floor": useful / rate,
        "products": done / (peak * made.efficiency[0]),
        "traffic": traffic(made) / (1e9 * made.device.bandwidth),
        "launches": launches(made),
        "exchange": exchanged(made) / (1e9 * made.device.link * facts()["link_efficiency"]["assumed"]),
        "host": host_seconds(made),
    }
    slow, fast = (_together(made, found | {"products": done / (peak * share)}) for share in made.efficiency[1:])
    return found | {"step": _together(made, found), "step_low": fast, "step_high": slow}


def _together(made: Plan, parts: dict[str, float]) -> float:
    """A step from its parts: workers run beside the device, FSDP2's exchange beside its products, other engines' behind them."""
    compute = max(parts["products"], parts["traffic"], parts["launches"])
    device = max(compute, parts["exchange"]) if made.engine == "fsdp2" else compute + parts["exchange"]
    return max(device, parts["host"]) if made.recipe.data.workers else device + parts["host"]


def traffic(made: Plan) -> float:
    """Bytes that a step reads and writes at least: weights once per pass over a chunk, kept activations out and in again."""
    batches = made.work.chunks(made.budget.chunk_tokens)
    weights = made.inventory.total * made.numbers.stored
    passes = sum(3 * len(chunks) - kept_chunks(chunks, made.budget.keep_tokens) for chunks in batches)
    graphs = sum(2 * chunk_bytes(made, chunk) for chunks in batches for chunk in chunks)
    return made.recipe.train.accumulate * (passes * weights + graphs) / len(batches)


def launches(made: Plan) -> float:
    """Seconds of starting kernels: so many for each layer in every pass over a chunk, backward twice as many, 6 more for each adapter."""
    rates = facts()["launch"]
    batches = made.work.chunks(made.budget.chunk_tokens)
    kernels = 0.0
    for stack in made.inventory.stacks:
        linears = [op for op in stack.ops if isinstance(op, Linear)]
        each = rates["kernels"] * len({op.block for op in linears}) + 6 * sum(op.rank > 0 for op in linears)
        used = [[chunk for chunk in chunks if chunk.pictures or stack.part == "language"] for chunks in batches]
        passes = 1 if stack.replayed else 4 if stack.learns else 2
        kernels += each * passes * sum(map(len, used)) / len(batches)
    return 1e-6 * rates["microseconds"] * kernels * made.recipe.train.accumulate


def exchanged(made: Plan) -> float:
    """Bytes that a device sends in a step: gradients once (a ring sends each twice), spread weights in every pass over a chunk."""
    if made.ranks == 1:
        return 0.0
    part = (made.ranks - 1) / made.ranks
    gradients = 2 * part * _trained_bytes(made)
    if made.engine not in SPREAD_WEIGHTS:
        return gradients
    batches = made.work.chunks(made.budget.chunk_tokens)
    passes = sum(3 * len(chunks) - kept_chunks(chunks, made.budget.keep_tokens) for chunks in batches) / len(batches)
    return gradients + made.recipe.train.accumulate * passes * part * made.inventory.sharded * made.numbers.stored


def host_seconds(made: Plan) -> float:
    """Seconds that the workers of a rank need for the pictures of a step."""
    rates = facts()["host"]
    pictures = [picture for entry in made.work.entries for picture in entry.pictures]
    work = sum(rates["decode"] * one.given + rates["squash"] * one.squashed + rates["process"] * one.made for one in pictures)
    return 1e-9 * work * made.recipe.train.accumulate / len(made.work.batches) / max(1, made.recipe.data.workers)


# -- all of it


def estimate(made: Plan) -> dict[str, Any]:
    """Everything as plain numbers (bytes, seconds, operations), for --json and the table."""
    recipe, work = made.recipe, made.work
    ops, held = operations(made), memory(made)
    seconds = times(made, ops["done"], ops["useful"])
    chunks = work.chunks(made.budget.chunk_tokens)
    tokens = sum(sum(chunk.lengths) for batch in chunks for chunk in batch)
    padded = sum(chunk.padded for batch in chunks for chunk in batch)
    pairs = recipe.train.global_batch * recipe.train.accumulate
    return {
        "format": 1,
        "recipe": {"digest": recipe.digest, "model": recipe.model.path, "engine": made.engine, "steps": work.steps, "pairs": pairs},
        "device": {"name": made.device.name, "count": made.ranks, "memory": 1e9 * made.device.memory, "source": made.device.source},
        "model": {
            "parameters": made.inventory.total,
            "trained": made.inventory.trained,
            "adapter_bytes": 4 * made.inventory.adapter,
            "source": made.model_source,
            "crossing": made.inventory.crossing,
        },
        "items": {
            "basis": work.basis,
            "count": len(work.entries) / len(chunks),
            "pictures": sum(len(entry.pictures) for entry in work.entries) / len(chunks),
            "tokens": tokens / len(chunks),
            "padding": 1 - tokens / padded,
            "longest": max(entry.tokens for entry in work.entries),
            "chunks": sum(map(len, chunks)) / len(chunks),
        },
        "chunks": asdict(made.budget),
        "operations": ops,
        "efficiency": dict(zip(("assumed", "low", "high"), made.efficiency, strict=True)),
        "seconds": seconds,
        "pairs_per_second": pairs / seconds["step"],
        "hours": {name: work.steps * seconds[key] / 3600 for name, key in (("likely", "step"), ("low", "step_low"), ("high", "step_high"))},
        "bound": bound(made, seconds),
        "memory": {**held, "sum": sum(held.values())},
        "fits": _fits(made),
        "advice": advice(made, ops, held, seconds),
    }


def bound(made: Plan, seconds: dict[str, float]) -> str:
    """The part that a step waits for."""
    return BOUNDS[max(BOUNDS, key=lambda name: seconds[name])]


def advice(made: Plan, ops: dict[str, float], held: dict[str, float], seconds: dict[str, float]) -> list[str]:
    """Which keys to change, with what it would bring."""
    room = 1e9 * made.device.memory - sum(held.values())
    found = [_smaller(made)] if room < 0 else []
    if seconds["host"] > max(seconds["products"], seconds["exchange"]):
        found.append(f"data.workers: more than {made.recipe.data.workers} per device, as far as there are cores; or smaller pictures")
    lean = made.without_dropout()
    if any(isinstance(op, Linear) and op.dora and op.dropout for stack in made.inventory.stacks for op in stack.ops):
        saved = 1 - operations(lean)["done"] / ops["done"]
        found.append(f"lora.dropout: 0 would save {saved:.0%} of the operations: DoRA behind dropout computes every frozen product twice")
    keep = _keep(made) if not made.budget.keep_tokens else 0
    saved = 1 - operations(made.cut(keep_tokens=keep))["done"] / ops["done"]
    if keep and saved >= WORTH:
        found.append(f"train.keep_tokens: {keep} fits and would save {saved:.0%} of the operations: those chunks are encoded once")
    return found


def _smaller(made: Plan) -> str:
    """The mildest change that fits: smaller chunks, then recomputed activations, then spread weights."""
    for checkpointing in (False, True):
        for engine in dict.fromkeys((made.engine, "fsdp2")):
            for tokens in _halves(made.budget.chunk_tokens):
                changes = {"chunk_tokens": tokens, "activation_checkpointing": checkpointing or made.budget.activation_checkpointing}
                if _fits(made.under(engine).cut(**changes, keep_tokens=0)):
                    saving = ", train.activation_checkpointing: true" * checkpointing
                    spreading = f", train.engine: {engine}" * (engine != made.engine)
                    return f"does not fit; train.chunk_tokens: {tokens}{saving}{spreading} would"
    return "does not fit, not even one item at a time over all devices; take a smaller model, smaller pictures or more devices"


def _keep(made: Plan) -> int:
    """The largest keep_tokens, doubled from one chunk, whose graphs leave a tenth of the memory; 0 if none does."""
    best, tokens = 0, made.budget.chunk_tokens
    most = max(sum(chunk.padded for chunk in chunks) for chunks in made.work.chunks(tokens))
    while tokens < 2 * most and _fits(made.cut(keep_tokens=tokens), share=0.9):
        best, tokens = tokens, 2 * tokens
    return best
