"""mteb beside our own harness: the same model, ours or anybody's, gets the same score from both."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import mteb
import mteb.mocks.mock_tasks as mocks
import numpy as np
import pytest
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.results import BenchmarkResults, ModelResult
from mteb.types import PromptType
from PIL import Image
from torch.utils.data import DataLoader

from tests.suites import PENCIL, TIED, Compass, Constant, lists_with_copies, pencil_suite, write_suite
from tests.test_scoring import Words, write_corpus
from vlm2vec import Encoder, prompts, ranking
from vlm2vec.data.made import write_made
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.errors import DataError, EnvError, ImageError, InputError
from vlm2vec.evalsets import take_in
from vlm2vec.evaluate import evaluate
from vlm2vec.integrations.mteb import MtebModel, SuiteTask, benchmark, means, suite_tasks
from vlm2vec.suite import Suite, load_suite

MMEB = load_suite("mmeb")
# pictures in CMYK and an answer of two; questions and a text beyond the limit; a stray placeholder; pictures with words; turned pictures
KINDS = ("HatefulMemes", "DocVQA", "WebQA", "CIRR", "N24News")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_pretrained("builtin/tiny-qwen2_vl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("made")
    write_made(folder, MMEB.only(KINDS), queries=12, candidates=8, train_rows=1)
    return load_suite(folder)


def run(model: Any, tasks: Any, **options: Any) -> ModelResult:
    return mteb.evaluate(model, tasks, cache=None, show_progress_bar=False, **options)


def found(result: ModelResult) -> dict[str, dict[str, Any]]:
    """What mteb reports of each set."""
    return {each.task_name: each.scores["test"][0] for each in result.task_results}


def same_scores(suite: Suite, ours: dict[str, Any], result: ModelResult) -> None:
    scores = found(result)
    assert scores.keys() == {f"{suite.name}-{name}" for name in ours["sets"]}
    for name, entry in ours["sets"].items():
        theirs = scores[f"{suite.name}-{name}"]
        assert theirs[entry["metric"]] == theirs["main_score"] == entry["score"], name


# -- our model, both harnesses -----------------------------------------------------------------------------------------------------------


def test_our_model_scores_the_same_query_by_query(encoder: Encoder, made: Suite, tmp_path: Path) -> None:
    evaluation = evaluate(encoder, made, tmp_path / "cache")
    theirs = benchmark(made)
    result = run(MtebModel(encoder), theirs, prediction_folder=tmp_path)
    same_scores(made, evaluation.results, result)
    mean = theirs.get_score(BenchmarkResults(model_results=[result]))["builtin/tiny-qwen2_vl"]["Mean(Task)"]
    assert mean == pytest.approx(evaluation.results["means"]["overall"]["score"], abs=1e-12)
    assert means(result, made) == pytest.approx({name: mean["score"] for name, mean in evaluation.results["means"].items()})
    for task in take_in(made).tasks:
        lines = [line for line in evaluation.predictions() if line["set"] == task.spec.name]
        scores = json.loads((tmp_path / f"{made.name}-{task.spec.name}_predictions.json").read_text())["default"]["test"]
        assert len(scores) == len(lines) == 12
        for line, members, right in zip(lines, task.candidates or [], task.relevant, strict=True):
            listed = scores[str(line["row"])]
            assert listed.keys() == {task.targets[index] for index in members}
            assert sorted(listed.values(), reverse=True)[:5] == pytest.approx([each["score"] for each in line["retrieved"]], abs=6e-4)
            gold = listed[task.targets[right[0]]]
            assert line["gold_rank"] == sum(score >= gold for score in listed.values())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["v1", "instruct"])
def test_all_sets_of_mmeb_score_the_same(encoder: Encoder, tmp_path: Path, layout: Any) -> None:
    write_made(tmp_path, MMEB, queries=40, candidates=24, train_rows=1, layout=layout)
    suite = load_suite(tmp_path)
    ours = evaluate(encoder, suite, tmp_path / "cache").results
    result = run(MtebModel(encoder), benchmark(suite))
    same_scores(suite, ours, result)
    assert len(ours["sets"]) == 36
    assert means(result, suite) == pytest.approx({name: mean["score"] for name, mean in ours["means"].items()})
    hashed = evaluate(Drawn(), suite, tmp_path / "cache").results
    same_scores(suite, hashed, run(Foreign(Drawn()), benchmark(suite)))


def test_a_limit_chooses_the_same_queries(encoder: Encoder, made: Suite, tmp_path: Path) -> None:
    suite = made.only(["WebQA"])
    ours = evaluate(encoder, suite, tmp_path, limit=5, seed=3).results
    tasks = suite_tasks(suite, limit=5, seed=3)
    same_scores(suite, ours, run(MtebModel(encoder), tasks))
    tasks[0].load_data()
    assert [row["id"] for row in tasks[0].dataset["default"]["test"]["queries"].remove_columns("image")] == [
        str(row) for row in take_in(suite, limit=5, seed=3).tasks[0].rows
    ]
    assert tasks[0].metadata.revision != suite_tasks(suite)[0].metadata.revision  # mteb must not take one for the other


def test_means_are_withheld_where_a_set_is_missing(encoder: Encoder, made: Suite) -> None:
    result = run(MtebModel(encoder), suite_tasks(made.only(["DocVQA"])))
    known = found(result)[f"{made.name}-DocVQA"]["main_score"]
    assert means(result, made) == {**dict.fromkeys(["classification", "retrieval", "IND", "overall", "macro"]), "vqa": known}


# -- anybody's model, both harnesses -----------------------------------------------------------------------------------------------------


class Foreign(AbsEncoder):
    """A model as others write them: it reads text and picture of mteb's batches, and knows nothing of us."""

    def __init__(self, inner: Compass) -> None:
        self.inner = inner
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": "someone/model", "similarity_fn_name": ScoringFunction.DOT_PRODUCT, "modalities": ["text", "image"]}
        )

    def encode(self, inputs: DataLoader, **_: Any) -> np.ndarray:
        return self.inner.window([item for batch in inputs for item in self.items(batch)]).numpy()

    def items(self, batch: dict[str, Any]) -> Iterator[Item]:
        images = batch.get("image") or [None] * len(batch["text"])
        for text, image in zip(batch["text"], images, strict=True):
            yield Item(text, (ImageRef(file_of(image)),) if image else ())


def file_of(image: Image.Image) -> Any:
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer


class Drawn(Compass):
    """A direction drawn from a hash of the words and the pixels, as `datasets` decodes them."""

    model = "drawn"

    def row(self, item: Item) -> np.ndarray:
        shown = [prompts.words(item).encode(), *(pixels(image.source) for image in item.images)]
        row = np.random.default_rng(list(hashlib.sha256(b"\n".join(shown)).digest())).normal(size=16)
        return row / np.linalg.norm(row)


def pixels(source: Any) -> bytes:
    stored = {"bytes": source.getvalue(), "path": None} if isinstance(source, BytesIO) else {"bytes": None, "path": str(source)}
    return datasets.Image().decode_example(stored).convert("RGB").tobytes()


def with_pictures(suite: Suite) -> Suite:
    """The pencil suite as its rows are; its datasets.yaml says I and T everywhere."""
    changes = {"pictures": {"query_modality": "T", "target_modality": "I"}, "crops": {"query_modality": "I+T", "target_modality": "I"}}
    return replace(suite, sets=tuple(replace(spec, **changes.get(spec.name, {})) for spec in suite.sets))


def test_a_foreign_model_scores_what_a_pencil_says(tmp_path: Path) -> None:
    suite = with_pictures(write_suite(tmp_path, pencil_suite(tmp_path)))
    result = run(Foreign(Compass()), benchmark(suite))
    same_scores(suite, evaluate(Compass(), suite, tmp_path / "cache").results, result)
    assert {name: score["main_score"] for name, score in found(result).items()} == {
        f"compass-{name}": pytest.approx(sum(hits) / 12) for name, hits in PENCIL.items()
    }
    assert TIED["answers"] == 2


def test_a_foreign_model_scores_the_same_on_the_sets_of_mmeb(made: Suite, tmp_path: Path) -> None:
    same_scores(made, evaluate(Drawn(), made, tmp_path).results, run(Foreign(Drawn()), benchmark(made)))


def test_ties_and_copies_among_two_hundred_lists(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, {"words": ("retrieval", "IND", lists_with_copies())})
    suite = replace(suite, sets=(replace(suite.sets[0], query_modality="T"),))
    ours = evaluate(Words(), suite, tmp_path / "cache").results
    result = run(Foreign(Words()), suite_tasks(suite))
    same_scores(suite, ours, result)
    assert ours["sets"]["words"]["ties"] > 20
    theirs = found(result)["compass-words"]
    assert ours["sets"]["words"]["score"] < theirs["hit_rate_at_1"]  # mteb lets the later name win, so some ties are hits


@pytest.mark.parametrize("metric", ["hit@1", "ndcg_linear@5", "recall@10"])
def test_one_corpus_with_graded_answers(tmp_path: Path, metric: str) -> None:
    write_corpus(tmp_path, metric)
    suite = load_suite(tmp_path)
    same_scores(suite, evaluate(Words(), suite, tmp_path / "cache").results, run(Foreign(Words()), suite_tasks(suite)))


def test_a_collapsed_model_scores_nothing(tmp_path: Path) -> None:
    suite = with_pictures(write_suite(tmp_path, pencil_suite(tmp_path)))
    scores = found(run(Foreign(Constant()), suite_tasks(suite.only(["labels"]))))["compass-labels"]
    assert scores["main_score"] == 0 < scores["hit_rate_at_1"]


def test_a_relevant_document_beyond_the_best_is_a_miss(encoder: Encoder, made: Suite) -> None:
    task = suite_tasks(made.only(["DocVQA"]))[0]
    task.load_data()
    others = {str(row): {"some": 0.5} for row in task.judged.rows}
    assert task.task_specific_scores({}, {}, others, "test", "default") == {"precision@1": 0.0}


# -- mteb's tasks on our model -----------------------------------------------------------------------------------------------------------

MOCKS = (
    mocks.MockRetrievalTask, mocks.MockRerankingTask, mocks.MockInstructionRetrieval, mocks.MockAny2AnyRetrievalI2TTask,
    mocks.MockAny2AnyRetrievalT2ITask, mocks.MockMultiChoiceTask, mocks.MockClassificationTask, mocks.MockImageClassificationTask,
    mocks.MockSTSTask, mocks.MockPairImageClassificationTask, mocks.MockImageTextPairClassificationTask, mocks.MockSummarizationTask,
    mocks.MockZeroShotClassificationTask, mocks.MockBitextMiningTask, mocks.MockImageClusteringFastTask,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_task_runs(encoder: Encoder) -> None:
    result = run(MtebModel(encoder), [task() for task in MOCKS])
    assert len(result.task_results) == len(MOCKS)
    for each in result.task_results:
        assert np.isfinite(each.get_score()), each.task_name


def described(category: str, **more: Any) -> TaskMetadata:
    settings: dict[str, Any] = {"type": "Any2AnyRetrieval", "name": "Trial", **more}
    return TaskMetadata(
        dataset={"path": "none", "revision": "1"}, description="", category=category,  # type: ignore[arg-type]
        modalities=["text", "image"], eval_langs=["eng-Latn"], main_score="hit_rate_at_1", **settings,
    )  # fmt: skip


def painted(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


def embed(model: MtebModel, metadata: TaskMetadata, columns: dict[str, list], prompt_type: PromptType | None = None) -> np.ndarray:
    features = datasets.Features({name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns})
    rows = datasets.Dataset.from_dict(columns, features)
    loader = create_dataloader(rows, task_metadata=metadata, prompt_type=prompt_type, batch_size=2)
    return model.encode(loader, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=prompt_type)


def test_embeddings_are_those_of_encode(encoder: Encoder) -> None:
    pictures = [painted((200, 10, 10)), painted((10, 200, 10)), None]
    columns = {"id": ["a", "b", "c"], "text": ["a red car", "", "only words"], "image": pictures}
    model = MtebModel(encoder, instructions={"query": "Find it:"})
    rows = embed(model, described("it2it"), columns, PromptType.query)
    wanted = encoder.encode([{"text": "a red car", "image": pictures[0]}, pictures[1], "only words"], instruction="Find it:")
    assert rows.dtype == np.float32 and torch.allclose(torch.from_numpy(rows), wanted, atol=1e-6)
    assert not torch.allclose(wanted, encoder.encode([{"text": "a red car", "image": pictures[0]}, pictures[1], "only words"]), atol=1e-3)
    alone = embed(model, described("i2t"), {"id": ["b"], "image": [pictures[1]]}, PromptType.query)
    assert np.allclose(alone[0], rows[1], atol=1e-6)


def test_several_pictures_and_open_ones_in_an_item(encoder: Encoder) -> None:
    pictures = [[painted((200, 10, 10)), painted((10, 200, 10))], [painted((10, 10, 200))]]
    loader = [{"text": ["first", "second"], "image": pictures}]
    inputs: Any = type("Loader", (list,), {"dataset": [0, 1]})(loader)
    model = MtebModel(encoder, instructions={"query": ""})
    rows = model.encode(inputs, task_metadata=described("it2it"), hf_split="test", hf_subset="default")
    wanted = encoder.encode([{"text": text, "image": image} for text, image in zip(["first", "second"], pictures, strict=True)])
    assert np.allclose(rows, wanted.numpy(), atol=1e-6)


def test_stored_pictures_are_decoded_by_our_own_reader(encoder: Encoder, tmp_path: Path) -> None:
    """A turned picture of sixteen bits: what others make of one is not what models here were trained on."""
    file = tmp_path / "deep.png"
    Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)).save(file)
    stored = {"path": str(file), "bytes": None}
    metadata = described("i2t")
    row = embed(MtebModel(encoder, instructions={"query": ""}), metadata, {"id": ["a"], "image": [stored]}, PromptType.query)
    assert np.allclose(row, encoder.encode([{"image": file}]).numpy(), atol=1e-6)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match="deep.png"):
        embed(MtebModel(encoder), metadata, {"id": ["a"], "image": [stored]}, PromptType.query)


def test_an_empty_text_is_embedded(encoder: Encoder) -> None:
    columns = {"id": ["a", "b"], "text": ["", "words"]}
    rows = embed(MtebModel(encoder), described("t2t"), columns, PromptType.document)
    assert np.isfinite(rows).all() and not np.allclose(rows[0], rows[1], atol=1e-3)


# -- instructions ------------------------------------------------------------------------------------------------------------------------

SAVED = SimpleNamespace(query_instruction="saved query", target_instruction="saved target")
BARE = SimpleNamespace(query_instruction="", target_instruction="")
QUERY, DOCUMENT = PromptType.query, PromptType.document


@pytest.mark.parametrize(
    ("given", "encoder_", "prompt", "side", "wanted"),
    [
        ({}, BARE, "task", QUERY, "task"),
        ({}, BARE, "task", DOCUMENT, ""),
        ({}, BARE, "task", None, "task"),
        ({}, BARE, {"query": "q", "document": "d"}, DOCUMENT, "d"),
        ({}, BARE, {"query": "q"}, DOCUMENT, ""),
        ({}, SAVED, "task", QUERY, "saved query"),
        ({}, SAVED, "task", DOCUMENT, "saved target"),
        ({"query": "mine"}, SAVED, "task", QUERY, "mine"),
        ({"query": "mine"}, SAVED, "task", None, "mine"),
        ({"query": "mine"}, SAVED, "task", DOCUMENT, "saved target"),
        ({"query": ""}, SAVED, "task", QUERY, ""),
        ({"query": "side", "Any2AnyRetrieval": "type"}, BARE, "task", QUERY, "type"),
        ({"Any2AnyRetrieval": "type", "Trial": "task of mine"}, BARE, "task", DOCUMENT, "task of mine"),
        ({"Trial": "task of mine", "Trial-query": "its queries"}, BARE, "task", QUERY, "its queries"),
        ({"Trial-query": "its queries"}, BARE, "task", DOCUMENT, ""),
    ],
)
def test_which_instruction_is_used(given: dict[str, str], encoder_: Any, prompt: Any, side: PromptType | None, wanted: str) -> None:
    model = MtebModel.__new__(MtebModel)
    model.model, model.instructions = encoder_, given
    assert model.instruction(described("it2it", prompt=prompt), side) == wanted


def test_without_any_prompt_the_kind_of_task_speaks_for_queries(encoder: Encoder) -> None:
    model, metadata = MtebModel(encoder), mocks.MockRetrievalTask.metadata.model_copy(update={"prompt": None})
    assert model.instruction(metadata, QUERY) == mocks.MockRetrievalTask.abstask_prompt
    assert model.instruction(metadata, DOCUMENT) == ""


def test_rows_of_a_suite_get_no_instruction(encoder: Encoder, made: Suite) -> None:
    suite = made.only(["CIRR"])
    plain, told = (MtebModel(encoder, instructions=given) for given in ({}, {"query": "Now for something else:"}))
    assert found(run(plain, suite_tasks(suite))) == found(run(told, suite_tasks(suite)))


# -- what others see, and what is refused ------------------------------------------------------------------------------------------------


def test_the_words_of_a_row_travel_with_their_instruction_and_the_prompt_as_it_is(made: Suite) -> None:
    tasks = {task.suite.sets[0].name: task for task in suite_tasks(made)}
    for task in tasks.values():
        task.load_data()
    queries = {name: task.dataset["default"]["test"]["queries"] for name, task in tasks.items()}
    text = queries["HatefulMemes"][0]["text"]
    assert text == "Represent the given image for binary classification to determine whether it constitutes hateful speech or not"
    assert queries["HatefulMemes"][0]["vlm2vec_prompt"] == f"<|image_1|>\n{text}\n"
    assert queries["WebQA"][0]["text"].startswith("<|image_1|>") is False and queries["WebQA"][0]["image"] is None
    assert queries["WebQA"][0]["vlm2vec_prompt"].startswith("<|image_1|>\n")  # stray; whether it goes is the model's choice
    assert (tasks["HatefulMemes"].metadata.category, tasks["WebQA"].metadata.category) == ("it2t", "t2it")
    assert tasks["CIRR"].metadata.name == f"{made.name}-CIRR" and tasks["CIRR"].metadata.main_score == "precision@1"


def test_a_task_is_read_again_after_it_was_unloaded(made: Suite) -> None:
    task = suite_tasks(made.only(["CIRR"]))[0]
    task.load_data()
    task.unload_data()
    task.load_data()
    assert isinstance(task, SuiteTask) and len(task.dataset["default"]["test"]["queries"]) == 12


def test_missing_data_and_false_modalities_are_said(tmp_path: Path, made: Suite) -> None:
    with pytest.raises(DataError, match=r"compass-crops: rows have pictures where the suite's modality is text"):
        suite_tasks(write_suite(tmp_path, pencil_suite(tmp_path)).only(["crops"]))[0].load_data()
    (tmp_path / "eval_images" / "angles" / "20.png").unlink()
    with pytest.raises(DataError, match=r"compass-crops: cannot be scored\n.*angles/20\.png"):
        suite_tasks(with_pictures(load_suite(tmp_path)).only(["crops"]))[0].load_data()


def test_what_mteb_is_told_of_a_model(encoder: Encoder, tmp_path: Path) -> None:
    meta = MtebModel(encoder).mteb_model_meta
    assert (meta.name, meta.revision) == ("builtin/tiny-qwen2_vl", encoder.fingerprint())
    assert meta.n_parameters == sum(tensor.numel() for tensor in encoder.model.parameters())
    assert (meta.embed_dim, meta.max_tokens, meta.similarity_fn_name.value) == (32, 512, "cosine")
    assert set(meta.modalities) == {"text", "image"}
    assert meta.license is meta.open_weights is meta.training_datasets is meta.languages is meta.adapted_from is None
    given = MtebModel(encoder, name="me/mine", revision="abc").mteb_model_meta
    assert (given.name, given.revision) == ("me/mine", "abc")
    encoder.save_pretrained(tmp_path / "run" / "model")
    assert MtebModel(Encoder.from_pretrained(tmp_path / "run" / "model")).mteb_model_meta.name == "local/run"
    with pytest.raises(InputError, match="owner/model"):
        MtebModel(encoder, name="mine")


def test_what_cannot_be_done_is_refused(encoder: Encoder) -> None:
    model = MtebModel(encoder)
    inputs: Any = type("Loader", (list,), {"dataset": [0]})([{"audio": [1]}])
    arguments: dict[str, Any] = {"task_metadata": described("it2it"), "hf_split": "test", "hf_subset": "default"}
    with pytest.raises(InputError, match="neither text nor image, its columns are audio"):
        model.encode(inputs, **arguments)
    with pytest.raises(InputError, match="precision: 'int8' was asked for"):
        model.encode(inputs, precision="int8", **arguments)


def test_similarity_is_exact_in_any_company(encoder: Encoder) -> None:
    rows = np.random.default_rng(0).normal(size=(2600, 48)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = MtebModel(encoder).similarity(torch.from_numpy(rows[:2000]), rows[1000:])
    wanted = rows[:2000].astype(np.float64) @ rows[1000:].astype(np.float64).T
    assert scores.dtype == torch.float32 and np.abs(scores.numpy() - wanted).max() < 1e-6
    assert torch.equal(MtebModel(encoder).similarity(rows[7], rows[1000:1031]), scores[7:8, :31])
    assert np.array_equal(scores[3, :5].numpy(), ranking.candidate_scores(rows[3:4], rows[1000:], [np.arange(5)])[0])


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vlm2vec.integrations.mteb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(EnvError, match=r"pip install 'vlm2vec\[mteb\]'"):
        importlib.import_module("vlm2vec.integrations.mteb")
