"""What a recipe may say: one frozen dataclass per section, each key with its type, default, range and one-line meaning.

The meanings and ranges are metadata of the fields, so that errors, `--help` and the documentation say the same. Nothing is read here:
`config` turns files into these classes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, Literal, get_args, get_type_hints

from vlm2vec.errors import RecipeError
from vlm2vec.io import digest
from vlm2vec.strict_yaml import describe, dump_plain, join, shorten

Part = Literal["language", "projector", "vision"]
RESOLUTIONS = {"low": 128, "mid": 672, "high": 1344}  # pixels along an edge, of VLM2Vec (arXiv 2410.05160)
Violation = tuple[str, str]  # (key, what is wrong with it)

RANGES: dict[str, Callable[[float], bool]] = {
    "> 0": lambda value: value > 0,
    ">= 0": lambda value: value >= 0,
    ">= 1": lambda value: value >= 1,
    ">= 2": lambda value: value >= 2,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 10080]": lambda value: 0 < value <= 10080,  # minutes of a week
}


def _key(meaning: str, default: Any = MISSING, within: str | None = None) -> Any:
    """A field with its one-line meaning; `within` is a key of RANGES and holds for every number in the value."""
    return field(default=default, metadata={"help": meaning, "range": within})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives; nothing here but the seed changes its result."""

    dir: str = _key("folder of the run; empty means runs/<name of the recipe>", "")
    seed: int = _key("seed of weights, data order and dropout", 17, ">= 0")
    trackers: tuple[str, ...] = _key("accelerate trackers that also receive the log, such as tensorboard", ())
    timeout: float = _key("minutes that a process waits for another, such as one that saves, before it gives up", 60.0, "in (0, 10080]")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and how an embedding is read from it."""

    path: str = _key("model folder, Hub id or builtin/<name>")
    revision: str | None = _key("commit or tag on the Hub; remote code needs a full commit", None)
    family: str | None = _key("model type; read from config.json when null; the tiny form needs it", None)
    trust_remote_code: bool = _key("run Python code that ships with the model; needs a pinned revision", False)
    dtype: Literal["float32", "bfloat16", "float16"] = _key("number format of the stored weights", "float32")
    attention: Literal["sdpa", "eager", "flash_attention_2", "packed"] = _key(
        "attention kernel; packed puts the items of a chunk into one row, flash_attention_2 needs the extra flash", "sdpa"
    )
    kernels: Literal["liger"] | None = _key("fused kernels of the language model, for GPUs; needs the extra kernels", None)
    pooling: Literal["last", "mean"] = _key("which hidden states become the embedding", "last")
    padding_side: Literal["left", "right"] = _key("side on which shorter rows are padded", "right")
    positions: Literal["native", "flat"] = _key(
        "where tokens sit: as the family lays them out, or counted one by one through pictures as the first published models were trained",
        "native",
    )
    max_tokens: int = _key("text tokens kept per item; image tokens are never cut and never counted", 512, ">= 1")
    min_pixels: int | None = _key("smallest picture area, for families that resize; null means the family's own", None, ">= 1")
    max_pixels: int | None = _key("largest picture area, for families that resize; null means the family's own", None, ">= 1")
    num_crops: int | None = _key("most crops of a picture, for families that cut; null means the checkpoint's own", None, ">= 1")
    resize: Literal["low", "mid", "high"] | int | None = _key(
        "edge of the square that pictures are squashed to before anything else; low is 128, mid 672, high 1344", None, ">= 1"
    )
    decode: Literal["exact", "draft"] = _key(
        "JPEG pictures at their full size; or at a half, quarter or eighth of it where that is twice what is needed: faster, not the same",
        "exact",
    )
    prompt: Literal["raw", "chat"] = _key("text as it is, or as a user turn of the checkpoint's own chat template", "raw")
    system: str | None = _key("system turn of a chat for items without an instruction, which takes its place", None)
    ending: str | None = _key("control tokens after the start of the answer of a chat, such as <|endoftext|>", None)
    keep_stray: bool = _key("keep a placeholder without a picture as text, rather than remove it", False)
    train: tuple[Part, ...] = _key("parts whose own weights are trained in full", ())

    def rules(self) -> Iterator[Violation]:
        """What holds between the keys of this section."""
        if not self.path:
            yield "path", "must not be empty"
        if self.trust_remote_code and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            yield "trust_remote_code", "needs model.revision as a 40-character commit"
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            yield "min_pixels", f"({self.min_pixels}) must not exceed model.max_pixels ({self.max_pixels})"
        for key in ("system", "ending"):
            if getattr(self, key) is not None and self.prompt != "chat":
                yield key, "belongs to a chat; write model.prompt: chat, or null here"
        yield from _distinct("train", self.train)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers of some parts."""

    rank: int = _key("rank of the update", 8, ">= 1")
    alpha: float = _key("the update is multiplied by alpha / rank, or by alpha / sqrt(rank) with rslora", 16.0, "> 0")
    dropout: float = _key("dropout in front of the adapter", 0.0, "in [0, 1)")
    dora: bool = _key("learn magnitude and direction apart (arXiv:2402.09353)", False)
    rslora: bool = _key("rank-stabilised factor (arXiv:2312.03732)", False)
    init: Literal["default", "gaussian"] = _key("how the first adapter matrix starts; the second starts at zero", "default")
    parts: tuple[Part, ...] = _key("parts whose linear layers get an adapter", ("language",))
    targets: tuple[str, ...] | None = _key("last name components of those layers; null means all linear layers of the parts", None)

    def rules(self) -> Iterator[Violation]:
        """What holds between the keys of this section."""
        if not self.parts:
            yield "parts", "must not be empty; write lora: null for no adapter"
        if self.targets is not None and not self.targets:
            yield "targets", "must not be empty; write null for all linear layers"
        yield from _distinct("parts", self.parts)
        yield from _distinct("targets", self.targets or ())


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of the mixture."""

    name: str = _key("name in logs and errors")
    path: str | None = _key("folder or file under data.root; null means the name", None)
    split: str = _key("split to read", "original")
    weight: float | None = _key("share in the mixture, relative to the others; null means its number of rows", None, ">= 0")
    cap: int | None = _key("use at most this many rows; null means all", None, ">= 1")
    take: Literal["random", "first"] = _key("which rows a cap keeps", "random")

    def rules(self) -> Iterator[Violation]:
        """What holds between the keys of this section."""
        if not self.name:
            yield "name", "must not be empty"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training pairs and how they are mixed."""

    root: str = _key("folder that holds the sources; picture paths in their rows start here")
    sources: tuple[SourceConfig, ...] = _key("datasets of the mixture")
    block: int = _key("consecutive pairs of one source inside a global batch; 0 means mixed freely", 0, ">= 0")
    workers: int = _key("processes per rank that read and decode ahead; 0 means none", 0, ">= 0")
    bad_pictures: Literal["stop", "skip"] = _key(
        "a pair with a picture that cannot be read stops the run, or is replaced by the next one of its source and listed", "stop"
    )
    max_bad_fraction: float = _key("share of the mixture's pairs that may be replaced before the run stops", 0.001, "in [0, 1)")

    feature_cache: float = _key(
        "GiB of disk for features of pictures by frozen vision and projector, so that no epoch encodes them again; 0 means none",
        0.0,
        ">= 0",
    )
    feature_folder: str | None = _key("folder of the feature cache, which several runs may share; null means the run's own", None)

    def rules(self) -> Iterator[Violation]:
        """What holds between the keys of this section."""
        if not self.root:
            yield "root", "must not be empty"
        if not self.sources:
            yield "sources", "must not be empty; give at least one - name: ..."
        elif all(source.weight == 0 for source in self.sources):
            yield "sources", "have weights that are all zero; at least one must be > 0"
        yield from _distinct("sources", [source.name for source in self.sources])


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """InfoNCE over the global batch (van den Oord et al. 2018, arXiv:1807.03748)."""

    temperature: float = _key("similarities are divided by it", 0.02, "> 0")
    learnable_temperature: bool = _key("train the temperature, from the value given", False)
    symmetric: bool = _key("average with the loss from targets to queries", False)
    explicit_negatives: bool = _key("use the negatives that rows carry, besides the other targets of the batch", True)
    duplicates: Literal["positive", "mask"] = _key(
        "other positives of the same query: they share the label, or are left out of each other's denominator", "positive"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation (AdamW) and its schedule."""

    steps: int | None = _key("optimizer steps; give either steps or epochs", None, ">= 1")
    epochs: float | None = _key("passes over the mixture; give either steps or epochs", None, "> 0")
    global_batch: int = _key("contrastive pairs of a step, over all processes", within=">= 2")
    accumulate: int = _key("global batches whose gradients are averaged into one optimizer step", 1, ">= 1")
    chunk_tokens: int | None = _key(
        "tokens encoded at once during training, padding included; null means what runs fastest, tried out before step 1", None, "> 0"
    )
    keep_tokens: int | None = _key(
        "tokens of a batch, padding included, encoded once with their graph kept, others twice; null means what memory holds", None, ">= 0"
    )
    replay_gib: float = _key("outputs of frozen towers held from the first pass to the second; more are computed twice", 8.0, ">= 0")
    lr: float = _key("peak learning rate", within="> 0")
    schedule: Literal["linear", "cosine", "constant"] = _key("shape of the learning rate after warm-up", "linear")
    warmup: int = _key("steps of linear warm-up", 0, ">= 0")
    weight_decay: float = _key("decoupled weight decay", 0.0, ">= 0")
    betas: tuple[float, float] = _key("decay rates of AdamW's two moments", (0.9, 0.999), "in [0, 1)")
    clip: float = _key("largest norm of the gradient; 0 means no clipping", 1.0, ">= 0")
    precision: Literal["fp32", "bf16"] = _key("autocast of the forward pass; the loss is always fp32", "fp32")
    activation_checkpointing: bool | None = _key(
        "recompute activations in the backward pass: less memory, more time; null means where trying it out shows it to be faster", False
    )
    compile: bool = _key("compile the layers of the language model: faster steps after minutes of compiling", False)
    projector_lr: float | None = _key("peak learning rate of the projector; null means lr", None, "> 0")
    engine: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] | None = _key(
        "who holds weights, gradients and optimizer of several processes; null means what accelerate's config says, else ddp", None
    )

    def rules(self) -> Iterator[Violation]:
        """What holds between the keys of this section."""
        if (self.steps is None) == (self.epochs is None):
            yield "steps", f"({self.steps or 'null'}) and train.epochs ({self.epochs or 'null'}): exactly one must be given"
        if self.steps and self.warmup >= self.steps:
            yield "warmup", f"({self.warmup}) must be smaller than train.steps ({self.steps})"
        if self.compile and self.engine not in (None, "ddp"):
            yield "compile", f"works with train.engine: ddp, not {self.engine}; take one of them out"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is saved, and how many states stay."""

    every: int = _key("steps between checkpoints; the last step is always saved", 500, ">= 1")
    keep: int = _key("newest checkpoints kept", 2, ">= 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The benchmark that runs with the training."""

    suite: str | None = _key("name under benchmarks/, or path of a datasets.yaml or of a file of pairs; null means no evaluation", None)
    root: str | None = _key("folder of the benchmark's data; null means the suite's own", None)
    before: bool = _key("evaluate before the first step", False)
    after: bool = _key("evaluate after the last step", True)
    limit: int | None = _key("queries per set; null means all", None, ">= 1")
    chunk_tokens: int = _key("tokens encoded at once, padding included", 32768, "> 0")
    protocol: Literal["strict", "reference"] = _key("strict: a tie is a miss; reference: the choices of VLM2Vec's own evaluation", "strict")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run. Built by `load_recipe`, which checks it; one built by hand is checked by `validate`."""

    run: RunConfig = _key("where the run lives", RunConfig())
    model: ModelConfig = _key("the backbone")
    lora: LoraConfig | None = _key("the adapter; null means none", None)
    data: DataConfig = _key("the training pairs")
    loss: LossConfig = _key("the objective", LossConfig())
    train: TrainConfig = _key("the optimisation")
    checkpoint: CheckpointConfig = _key("saving", CheckpointConfig())
    evaluate: EvaluateConfig = _key("the benchmark", EvaluateConfig())

    @cached_property
    def digest(self) -> str:
        """sha256 of `identity`: equal digests, equal runs."""
        return digest(self.identity())

    def identity(self) -> dict[str, Any]:
        """The resolved tree without what does not change the result: where the run and its features live, its engine, what it replays, how
        many bad pairs it bears.
        """
        tree = asdict(self) | {"run": {"seed": self.run.seed}}
        del tree["train"]["engine"], tree["train"]["replay_gib"], tree["data"]["max_bad_fraction"], tree["data"]["feature_folder"]
        return tree

    def rules(self) -> Iterator[Violation]:
        """What holds between sections."""
        adapted = self.lora.parts if self.lora else ()
        if both := sorted(set(adapted) & set(self.model.train)):
            yield "model.train", f"and lora.parts both name {', '.join(both)}; a part is adapted or trained in full"
        if not adapted and not self.model.train:
            yield "model.train", "is empty and lora is null: nothing would be trained"
        if self.train.projector_lr is not None and "projector" not in (*adapted, *self.model.train):
            yield "train.projector_lr", "is given but the projector is not trained; add it to model.train or lora.parts"
        if self.data.feature_cache and (trained := sorted({"vision", "projector"} & {*adapted, *self.model.train})):
            yield "data.feature_cache", f"needs frozen vision and projector, and this recipe trains {' and '.join(trained)}; write 0"
        if self.train.compile and self.model.kernels:
            yield "train.compile", f"would compile the kernels of {self.model.kernels} again; take one of them out"
        if self.data.block and self.train.global_batch % self.data.block:
            yield "data.block", f"({self.data.block}) must divide train.global_batch ({self.train.global_batch})"

    def validate(self) -> None:
        """RecipeError naming the first key whose value, or whose combination with others, makes no sense."""
        for key, problem in violations(self):
            raise RecipeError(f"{key} {problem}")


# ---------------------------------------------------------------------------------------------------------------- checks


def violations(section: Any, key: str = "") -> Iterator[Violation]:
    """Everything wrong with the values of `section` and its sub-sections, ranges first; `key` is its dotted path."""
    for entry in fields(section):
        value, path = getattr(section, entry.name), join(key, entry.name)
        for name, part in _elements(value, path):
            yield from violations(part, name) if is_dataclass(part) else _range(part, name, entry.metadata["range"])
    for name, problem in getattr(section, "rules", tuple)():
        yield join(key, name), problem


def _elements(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    return ((f"{key}[{index}]", part) for index, part in enumerate(value)) if isinstance(value, tuple) else [(key, value)]


def _range(value: Any, key: str, within: str | None) -> Iterator[Violation]:
    if within and isinstance(value, int | float) and not (math.isfinite(value) and RANGES[within](value)):
        yield key, f"must be {within}{' and finite' if isinstance(value, float) else ''}, got {dump_plain(value, flow=True).strip()}"


def _distinct(key: str, names: Iterable[str]) -> Iterator[Violation]:
    for name, count in Counter(names).items():
        if count > 1:
            yield key, f"names {shorten(name)} {count} times"


# ---------------------------------------------------------------------------------------------------------------- reference


def reference() -> list[tuple[str, str, str, str]]:
    """Every key of a recipe as (dotted key, type and range, default, meaning), for `--help` and the documentation."""
    return [("base", "string", "absent", "recipe that this one starts from, relative to this file"), *_reference(Recipe, "")]


def _reference(section: Any, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for entry in fields(section):
        kind, key = get_type_hints(section)[entry.name], join(prefix, entry.name)
        inner = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        if inner is not kind:  # a section that is always there is told by its keys
            default = "required" if entry.default is MISSING else dump_plain(entry.default, flow=True).strip()
            yield key, _describe_range(describe(kind), entry.metadata["range"]), default, entry.metadata["help"]
        if inner is not None:
            yield from _reference(inner, f"{key}[]" if get_args(kind)[-1:] == (Ellipsis,) else key)


def _describe_range(kind: str, within: str | None) -> str:
    return re.sub("integer|numbers?", lambda match: f"{match.group()} {within}", kind) if within else kind
