"""The documentation: the site builds without a warning and needs no network, its references are whole, what pages tell to do works."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from PIL import Image

from tests.corpora import paint
from tests.runs import start_run, tiny_recipe
from vlm2vec import Encoder, trainer
from vlm2vec.backbones import resolve
from vlm2vec.cli import COMMANDS, main, parse
from vlm2vec.config import LossConfig, ModelConfig, load_recipe, reference
from vlm2vec.data.mixture import mixture_of
from vlm2vec.errors import Vlm2VecError
from vlm2vec.losses import InfoNCE
from vlm2vec.pictures_only import pictures_only
from vlm2vec.suite import load_suite

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "object": "data", "embed": "src"}


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\b[^\n]*\n(.*?)^```", text(f"docs/{page}.md"), re.M | re.S)


class Html(HTMLParser):
    """What a page loads, where its links go, what may be linked to in it, and its words."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.nav: set[str] = set()
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.ids.add(found.get("id", ""))
        if tag in LOADED and LOADED[tag] in found:
            self.loads.append(found[LOADED[tag]])
        if tag == "link" and found.get("rel") not in ("next", "prev"):
            self.loads.append(found["href"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            if "md-nav__link" in found.get("class", ""):
                self.nav.add(found["href"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def said(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning would have been an error."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Html]:
    return {file: Html(file) for file in site.rglob("*.html")}


# -- the site


def test_every_link_of_the_site_leads_to_a_place_in_it(pages: dict[Path, Html]) -> None:
    away = [(file, link) for file, page in pages.items() for link in page.links if urlsplit(link).scheme]
    assert away and all(link.startswith("https://") for _, link in away)
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or file.name == "404.html":  # that page is served under any address, and its links begin at the root
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.is_file(), f"{file.name}: {link}"
            assert not parts.fragment or target.suffix != ".html" or unquote(parts.fragment) in pages[target].ids, f"{file.name}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Html]) -> None:
    assert all(page.loads for page in pages.values())
    foreign = [(file.name, load) for file, page in pages.items() for load in page.loads if "//" in load and not load.startswith("data:")]
    styles = "".join(file.read_text("utf-8") for file in site.rglob("*.css"))
    assert foreign == [] and re.findall(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^)\"']+)", styles) == []


def test_search_works_from_a_folder(site: Path, pages: dict[Path, Html]) -> None:
    index = (site / "search" / "search_index.js").read_text("utf-8").removeprefix("var __index = ")
    found = json.loads(index)["docs"]
    assert any("train.warmup" in entry["text"] for entry in found) and not any(".yaml" in entry["location"] for entry in found)
    assert all(any(load.endswith("iframe-worker.js") for load in page.loads) for page in pages.values())


def test_every_page_is_in_the_navigation(site: Path, pages: dict[Path, Html]) -> None:
    home = pages[site / "index.html"]
    listed = {(site / link).resolve() for link in home.nav if not urlsplit(link).scheme and "#" not in link}
    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "recipes/README.md", *(ROOT / "benchmarks").glob("*/README.md")]:
        path = page.relative_to(ROOT).as_posix().removeprefix("docs/")
        place = path.replace("README.md", "index.html").replace(".md", ".html")
        assert (site / place).resolve() in listed, path


def test_nothing_but_pages_is_published(site: Path) -> None:
    assert not list(site.rglob("*.py")) and not list(site.rglob("*.md"))


LEFT = re.compile(r"<p>[^<]*\n\s*(?:[-*|]|\d+\.) |<code[^>]*>[^<]*\\\||\]\(")  # a list or table in a paragraph, \| in code, a link


def test_no_markup_is_left_as_text(pages: dict[Path, Html]) -> None:
    """GitHub begins a list without an empty line in front, the site does not; and so on."""
    assert all(LEFT.search(markup) for markup in ("<p>words\n- a list</p>", r"<code>a \| b</code>", "<p>[a] [b](c.md)</p>"))
    for file in pages:
        article = re.search(r"<article.*?</article>", file.read_text("utf-8"), re.S)
        prose = re.sub(r"<pre.*?</pre>", "", article[0] if article else "", flags=re.S)
        assert (found := LEFT.search(prose)) is None, (file.name, found and found[0])


# -- what the hooks do


def test_links_are_turned_to_where_things_lie(hooks: ModuleType) -> None:
    there = "[a](estimate.md#x) [b](../README.md) ![c](report.png) [d](../recipes/quickstart.yaml) [e](#f) [g](https://h.org/i.md)"
    here = "[a](estimate.md#x) [b](index.md) ![c](report.png) [d](recipes/quickstart.yaml.md) [e](#f) [g](https://h.org/i.md)"
    assert hooks.turned(there, "docs/speed.md") == here
    assert hooks.turned("[a](docs/speed.md) [b](benchmarks/mini/sets.md)", "README.md") == "[a](speed.md) [b](benchmarks/mini/sets.md)"
    assert hooks.turned("[a](../../docs/checkpoints.md#y)", "benchmarks/mmeb/README.md") == "[a](../../checkpoints.md#y)"


def test_what_pages_link_to_is_reached_and_shown(hooks: ModuleType) -> None:
    reached = set(hooks.reachable())
    assert {"README.md", "benchmarks/mini/sets.md", "recipes/quickstart.yaml", "docs/report.png"} <= reached
    assert "search: {exclude: true}" in hooks.shown("recipes/quickstart.yaml") and text("recipes/quickstart.yaml") in hooks.shown(
        "recipes/quickstart.yaml"
    )


def test_pages_that_nobody_named_come_into_the_navigation(hooks: ModuleType) -> None:
    class Config:
        nav: list[dict[str, Any]] = [{"Home": "index.md"}, {hooks.UNNAMED: [{"Speed": "speed.md"}]}]

    (section,) = hooks.on_config(Config()).nav[1].values()
    assert section[0] == {"Speed": "speed.md"} and "encode.md" in section and "speed.md" not in section


def test_words_are_not_taken_for_markup(hooks: ModuleType) -> None:
    assert hooks._plain("a <b> *c* d_e | `f_g <h>`") == r"a &lt;b&gt; \*c\* d\_e \| `f_g <h>`"


# -- references


def test_every_key_is_in_the_reference(site: Path, pages: dict[Path, Html]) -> None:
    page = pages[site / "recipe_keys.html"]
    said = re.sub(r"\s+", "", page.said)
    for row in reference():
        assert row[0] in page.ids and all(re.sub(r"[\s`]+", "", str(part)) in said for part in row), row


def actions(command: str, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str]]:
    """A command, and the commands below it, with what `--help` prints of each."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    told = capsys.readouterr().out
    yield command, told
    below = re.search(r"^  action\n((?:    .*\n)+)", told, re.M)
    for name in re.findall(r"^    (\S+)", below[1], re.M) if below else []:
        yield from actions(f"{command} {name}", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_in_the_reference(
    command: str, site: Path, pages: dict[Path, Html], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # a meaning on one line
    page = pages[site / "cli.html"]
    said = re.sub(r"\s+", " ", page.said)
    for name, told in actions(command, capsys):
        assert f"vlm2vec-{name.replace(' ', '-')}" in page.ids
        written = told.partition("\npositional arguments:")[2] or told.partition("\noptions:")[2]
        rows = re.findall(r"^  (\S.*?)(?: {2,}(\S.*))?$", written.partition("\nexit codes")[0], re.M)
        for option, meaning in [row for row in rows if not row[0].startswith("-h")]:
            assert option in said or option == "action", (name, option)
            assert re.sub(r"\s+", " ", meaning.replace("`", "")) in said, (name, meaning)


# -- what pages tell to do


COMMAND = re.compile(r"^    ((?:make|vlm2vec|accelerate launch) .*)", re.M)
LINES = [(page.stem, line) for page in [*PAGES, ROOT / "README.md"] for line in COMMAND.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_of_every_page_is_one_that_exists(page: str, line: str) -> None:
    words = shlex.split(re.split(r"&&|#|\s{3,}", line)[0])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", text("Makefile"), re.M)
    elif words[0] == "vlm2vec":
        parse(words[1:])
    elif "train.py" in words:
        assert (ROOT / parse(["train", *words[words.index("train.py") + 1 :]]).recipe).is_file()
    else:
        parse(words[words.index("vlm2vec") + 1 :])


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in as if it were the root of a clone, with the pictures that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in ("cat.png", "car.png"):
        Image.new("RGB", (40, 30), (len(name) * 20, 100, ord(name[2]))).save(name)
    return tmp_path


def run(block: str, **names: Any) -> dict[str, Any]:
    exec(compile(block, "page", "exec"), names)
    return names


def test_the_quickstart_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("quickstart", "python")
    for name in ("apple.jpg", "pear.jpg"):
        paint(Path("data/mini/eval_images/Groceries") / name, (200, 40, len(name)))
    run(block.replace("runs/quickstart/model", "builtin/tiny-qwen2_vl"))
    assert "tensor([[" in capsys.readouterr().out


def test_the_dataset_of_the_how_to_is_read(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r'^```\w+ title="(data/[^"]+|fruit.yaml)"\n(.*?)^```', text("docs/howto.md"), re.M | re.S)
    assert len(found) == 4
    for name, block in found:
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(block)
    for name in ("train/images/apple.png", "train/images/lemon.png", "eval_images/plum.png"):
        (workplace / "data/fruit" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (len(name), 90, 10)).save(workplace / "data/fruit" / name)
    recipe = load_recipe(workplace / "fruit.yaml")
    pairs = mixture_of(recipe)
    assert len(pairs) == 3 >= recipe.train.global_batch and recipe.evaluate.suite is not None
    assert load_suite(recipe.evaluate.suite, recipe.evaluate.root).sets[0].name == "colours"
    assert main(["data", "check", "data/fruit", "--suite", "data/fruit/datasets.yaml", "--decode"]) == 0
    (workplace / "data/fruit/eval_images/plum.png").unlink()
    assert main(["data", "check", "data/fruit", "--suite", "data/fruit/datasets.yaml"]) == 2
    assert "plum.png" in capsys.readouterr().out


def test_the_loss_of_the_how_to_is_what_it_says(workplace: Path) -> None:
    definition, check = blocks("howto", "python")
    sigmoid = run(definition)["Sigmoid"](LossConfig())
    run(check, Sigmoid=type(sigmoid))
    rows = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)
    own = torch.tensor([0])
    once = sigmoid(rows[:1], rows[1:], own, torch.tensor([0, 1, 2]))[0]
    again = sigmoid(rows[:1], rows[[1, 2, 3, 3]], own, torch.tensor([0, 1, 2, 2]))[0]
    assert float(once) == pytest.approx(float(again), rel=1e-12)  # a copy of a target changes nothing


@pytest.mark.slow
def test_the_loss_of_the_how_to_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "InfoNCE", run(blocks("howto", "python")[0])["Sigmoid"])
    start_run(tiny_recipe(tmp_path / "run", steps=3))
    log = [json.loads(line) for line in (tmp_path / "run" / trainer.LOG).read_text().splitlines()]
    assert len(log) == 3 and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in log)


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["recipes/quickstart.yaml", "train.warmp=3"], "unknown key train.warmp; did you mean warmup?"),
        (["recipes/quickstart.yaml", "train.steps=9"], "train.warmup (30) must be smaller than train.steps (9)"),
        (
            ["recipes/phi35_lora.yaml"],
            "suite mmeb: data folder data/MMEB-eval does not exist; run vlm2vec data get mmeb-eval, or give the folder as root",
        ),
    ],
)
def test_messages_are_quoted_as_they_are(
    arguments: list[str], quoted: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    assert quoted in capsys.readouterr().err and f"**`{quoted}`**" in text("docs/errors.md")


def test_the_page_on_errors_has_every_exit_code() -> None:
    def below(kind: type[Vlm2VecError]) -> Iterator[type[Vlm2VecError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    table = dict(re.findall(r"^\| (\d+) \| (.*?) \|", text("docs/errors.md"), re.M))
    for kind in (Vlm2VecError, *Vlm2VecError.__subclasses__()):
        if "exit_code" in vars(kind) and kind is not Vlm2VecError:
            assert f"`{kind.__name__}`" in table[str(kind.exit_code)]
    assert {each.exit_code for each in below(Vlm2VecError)} <= {int(code) for code in table}


def test_the_page_on_errors_names_every_extra() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert [name for name in settings["options.extras_require"] if f"`{name}`" not in text("docs/errors.md")] == []


# -- figures and names of other projects


KEYS = {row[0] for row in reference()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:run|model|lora|data|loss|train|checkpoint|evaluate)\.\w+(?:\[\]\.\w+)?)(?=[`:=])", page.read_text("utf-8"))
    files = ("train.py", "train.jsonl", "model.safetensors")
    assert [key for key in named if key not in KEYS and key not in files] == []


def test_published_figures_are_those_on_record() -> None:
    models = json.loads(text("benchmarks/mmeb/reference.json"))["models"]
    means = {(model["name"], quote["source"]): quote.get("means") for model in models for quote in model["quotes"]}
    phi, llava, seven = (
        means[name, "paper-table-2"]
        for name in ("VLM2Vec-Phi-3.5-V-LoRA", "VLM2Vec-LLaVA-1.6-LoRA (1344x1344)", "VLM2Vec-Qwen2-VL-7B")
    )
    two = [means["VLM2Vec-Qwen2-VL-2B", source]["overall"] for source in ("leaderboard", "v2-paper-table-2", "readme")]
    second = means["VLM2Vec-V2.0 (Qwen2-VL-2B)", "v2-paper-table-2"]["overall"]
    page = text("docs/reproduce.md")
    for found in (phi, llava, seven):
        assert f"| {found['overall']} ({found['IND']}, {found['OOD']}) | paper, Table 2 |" in page
    assert "| {0} to {2} | leaderboard {0}, second paper {1}, README {2} |".format(*two) in page
    assert f"| {second} on the 36 image sets | second paper, Table 2 |" in page


COSTLY = [name for name in re.findall(r"^\| \[`(\w+)`\]", text("docs/reproduce.md"), re.M) if name != "qwen2vl_2b_lora"]


@pytest.mark.parametrize("name", ["qwen2vl_2b_lora", *(pytest.param(name, marks=pytest.mark.slow) for name in COSTLY)])
def test_costs_are_those_of_the_estimate(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["estimate", f"recipes/{name}.yaml", "--gpu", "h100x8", "data.root=nowhere"]) == 0
    told = capsys.readouterr().out
    hours = re.search(r"^  hours +(.*?) for ", told, re.M)
    memory = re.search(r"^  memory +(\S+) of ", told, re.M)
    assert hours is not None and memory is not None
    assert f"| {hours[1]} | {memory[1]} |" in text("docs/reproduce.md").replace("  ", " ")


# -- beside sentence-transformers


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature that sentence-transformers saved."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    tiny = str(resolve(ModelConfig(path="builtin/tiny-qwen2_vl")))
    folder = tmp_path_factory.mktemp("foreign") / "model"
    with pictures_only():
        inner = Transformer(tiny, processing_kwargs={"chat_template": {"add_generation_prompt": True}})
        pooling = Pooling(inner.get_embedding_dimension(), pooling_mode="lasttoken")
        SentenceTransformer(modules=[inner, pooling, Normalize()], device="cpu").save_pretrained(str(folder))
    return folder


def test_before_and_after_give_the_same_vectors(foreign: Path, workplace: Path) -> None:
    with pictures_only():
        before, after = (run(block.replace("MODEL", str(foreign))) for block in blocks("migrate_st", "python"))
    for name in ("pictures", "query"):
        torch.testing.assert_close(after[name], torch.from_numpy(before[name]), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        after["encoder"].similarity(after["query"], after["pictures"]),
        before["model"].similarity(before["query"], before["pictures"]),
        atol=1e-6,
        rtol=0,
    )
    assert isinstance(after["encoder"], Encoder)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_losses_correspond_as_the_table_says(symmetric: bool) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=20, directions=directions, partition_mode="per_direction" if symmetric else "joint"
    )
    stream = torch.Generator().manual_seed(3)
    query, target = (torch.nn.functional.normalize(torch.randn(7, 5, generator=stream, dtype=torch.float64), dim=1) for _ in range(2))
    ours = InfoNCE(LossConfig(temperature=0.05, symmetric=symmetric))(query, target, torch.arange(7), torch.arange(7))[0]
    assert float(ours) == pytest.approx(float(theirs.compute_loss_from_embeddings([query, target], torch.arange(7))), rel=1e-6)
