"""The architecture as a test: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm2vec.errors import Vlm2VecError

ROOT = Path(__file__).parents[1]
LAYERS = tuple(
    names.split()
    for names in (
        "errors io dist log remote signals address",
        "strict_yaml schema config memory prompts pooling chunks quantize ranking metrics paired losses gradcache replay flops footprint "
        "devices nearest",
        "data collate transport backbones batch feed shards cache feature_cache vectors suite composition store approximate",
        "lora encoder engines budget checkpoint inventory",
        "precompute probe step trainer plan estimate workload evalsets fill bulk batched scoring evaluate results standings compare "
        "formats report pipeline export samples backends pictures_only plain probe_file verify hub_card push index serve",
        "cli commands __main__ integrations ui",
    )
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names} | {"data.types": 1}
# Who must not know whom although the layers allow it: data never sees a processor, and a reader of rows never sees a model.
STRANGERS = {"data": ("backbones", "collate", "batch"), "report": ("trainer", "encoder")}
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FAMILIES = r"qwen|phi-?3|idefics|smolvlm|vista|llava|gemma|internvl|llama"
MODULES = sorted(path for path in (ROOT / "vlm2vec").rglob("*.py"))
SCRIPTS = [ROOT / "train.py", *sorted((ROOT / "benchmarks").rglob("*.py"))]


def dotted(path: Path) -> str:
    """vlm2vec/data/types.py -> data.types; the package itself is ""."""
    return ".".join(path.relative_to(ROOT / "vlm2vec").with_suffix("").parts).removesuffix("__init__").strip(".")


NAMES = {dotted(path) for path in MODULES}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of this package that one statement imports, as `dotted` names them."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        if name.split(".")[0] == "vlm2vec":
            inner = name.removeprefix("vlm2vec").strip(".")
            yield inner if inner in NAMES else inner.rpartition(".")[0]


def layer_of(module: str) -> int:
    """The layer of the longest listed prefix."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    known = [LAYER_OF[prefix] for prefix in prefixes if prefix in LAYER_OF]
    assert known, f"vlm2vec.{module} has no layer: give it one in {Path(__file__).name}"
    return known[0]


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path)], ids=dotted)
def test_imports_point_down(path: Path) -> None:
    module = dotted(path)
    for node in ast.walk(tree(path)):
        for other in imported(node):
            assert other, f"{module} imports the package itself, line {node.lineno}"
            assert layer_of(other) <= layer_of(module), f"{module} imports {other}, which lies above it, line {node.lineno}"
            assert other.split(".")[0] not in STRANGERS.get(module.split(".")[0], ()), f"{module} imports {other}, line {node.lineno}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {dotted(path): {other for node in tree(path).body for other in imported(node)} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def called(node: ast.AST) -> str:
    """ "print" for print(...), "torch.load" for torch.load(...), "" for what is no plain call."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) else ""


def forbidden(node: ast.AST) -> str:
    """What this piece of syntax must not be, or ""."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        return ", ".join(name for name in names if name.split(".")[0] in NEVER_IMPORTED)
    call = called(node)
    if call in ("print", "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return call
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords} if isinstance(node, ast.Call) else {}
    return ", ".join(f"{name}=True" for name in ("shell", "allow_pickle") if options.get(name) == "True")


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads_and_nothing_prints(path: Path) -> None:
    found = [f"line {node.lineno}: {what}" for node in ast.walk(tree(path)) if (what := forbidden(node))]
    if path.relative_to(ROOT).parts[0] == "benchmarks":  # a script may talk to who runs it
        found = [line for line in found if not line.endswith(": print")]
    assert not found


def test_torch_load_stands_in_one_place_and_reads_weights_only() -> None:
    calls = {path: [node for node in ast.walk(tree(path)) if called(node) == "torch.load"] for path in MODULES + SCRIPTS}
    users = [path for path, found in calls.items() if found]
    assert len(users) <= 1
    for node in (node for found in calls.values() for node in found):
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only") == "True"


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_backbones_name_a_model_family(path: Path) -> None:
    if ROOT / "vlm2vec" / "backbones" in path.parents:
        return
    text = re.sub(r"builtin/[\w-]+", "", path.read_text("utf-8"))  # the name of a checkpoint, as help texts show it
    assert not re.findall(FAMILIES, text, re.IGNORECASE)


def test_other_peoples_tools_are_imported_in_integrations_alone() -> None:
    tools = {"mteb", "datasets"}
    users = {dotted(path).split(".")[0] for path in MODULES for node in ast.walk(tree(path)) if tools & outside(node)}
    assert users == {"integrations"}


def outside(node: ast.AST) -> set[str]:
    """The packages that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    return {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


def test_no_reader_runs_what_it_is_given(tmp_path: Path) -> None:
    """The same as an experiment: a pickle under every name that is ever read, to every public reader. The bomb itself works."""
    from vlm2vec import Encoder, io, results, suite
    from vlm2vec.backbones import load_backbone
    from vlm2vec.cache import EmbeddingCache
    from vlm2vec.config import ModelConfig, load_recipe
    from vlm2vec.data.images import load_image
    from vlm2vec.data.readers import Column, read_rows
    from vlm2vec.data.types import ImageRef

    canary = tmp_path / "canary"
    bombs = [pickle.dumps(Bomb(canary), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    pickle.loads(bombs[0])
    canary.rmdir()
    names = [
        *("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"),
        *("adapter_model.bin", "vlm2vec.json", "state.json", "optimizer.safetensors", "manifest.json", "datasets.yaml", "r.yaml"),
        *("a.jsonl", "a.parquet", "a.png", "results.json", "predictions.jsonl"),
    ]
    readers: list[Callable[[Path], object]] = [
        lambda here: Encoder.from_pretrained(here),
        lambda here: Encoder.from_pretrained("builtin/tiny-qwen2_vl", adapter=here),
        lambda here: load_backbone(ModelConfig(path=str(here))),
        lambda here: load_recipe(here / "r.yaml"),
        lambda here: suite.load_suite(here),
        lambda here: results.read(here / "results.json"),
        lambda here: io.verify_manifest(here),
        lambda here: io.read_json(here / "state.json"),
        lambda here: io.read_jsonl(here / "predictions.jsonl"),
        lambda here: load_image(ImageRef(here / "a.png")),
        *(lambda here, kind=kind: read_rows([here / f"a.{kind}"], [Column("q")]) for kind in ("jsonl", "parquet")),
    ]
    for number, bomb in enumerate(bombs):
        here = tmp_path / str(number)
        here.mkdir()
        for name in names:
            (here / name).write_bytes(bomb)
        for read in readers:
            with contextlib.suppress(Vlm2VecError):  # a reader of lines may take it for a torn last line
                read(here)
        cache = EmbeddingCache(here / "cache", "model")
        cache.directory.mkdir(parents=True)
        for suffix in ("json", "safetensors"):
            (cache.directory / f"shard.{suffix}").write_bytes(bomb)
        cache.refresh()
    assert not canary.exists()


def tracked() -> list[Path]:
    """What git tracks or would add; everything if this is no clone."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else ROOT.rglob("*")
    return [path for path in paths if path.is_file()]


def test_no_path_of_somebodys_machine_is_tracked() -> None:
    machine = re.compile(rb"\.\./share[d]|/wor[k]/|/tm[p]/w/|/roo[t]/|/home/[a-z]|/Users/[a-z]|C:\\\\Users")
    found = [str(path.relative_to(ROOT)) for path in tracked() if machine.search(path.read_bytes())]
    assert not found


def test_the_rules_themselves_find_what_they_forbid() -> None:
    bad = ["import pickle", "from dill import load", "print(1)", "eval('1')", "exec('1')", "yaml.load(x)", "run(shell=True)"]
    good = ["model.eval()", "yaml.safe_load(x)", "np.load(x, allow_pickle=False)", "import json", "run(shell=False)"]
    assert [any(forbidden(node) for node in ast.walk(ast.parse(line))) for line in bad + good] == [True] * len(bad) + [False] * len(good)
    assert list(imported(ast.parse("from vlm2vec import io").body[0])) == ["io"]
    assert list(imported(ast.parse("from vlm2vec.io import digest").body[0])) == ["io"]
    assert list(imported(ast.parse("from vlm2vec.data.types import Item").body[0])) == ["data.types"]
    assert list(imported(ast.parse("import vlm2vec.log").body[0])) == ["log"]
    assert (layer_of("data.types"), layer_of("data.images"), layer_of("io.files")) == (1, 2, 0)
