"""Model cards: what the Hub reads in front is what the run measured, and no place on a machine gets out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.measured import results
from vlm2vec import io
from vlm2vec.encoder import SETTINGS
from vlm2vec.export.record import RECIPE, RESULTS, record_of
from vlm2vec.hub_card import model_card

ROOT = Path(__file__).parents[1]
ABOUT = {"form": "merged", "dtype": "bfloat16", "base": "owner/base", "differences": [], "notes": ["Texts are cut."], "guarded": False}
OUTCOMES = {"Names": [1.0, 0.0, 1.0, 1.0], "Icons": [0.0, 0.0, 1.0, 0.0]}


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """The files of an export that a card is made of, from a run that lies somewhere on this machine."""

    def make(**about: object) -> Path:
        run, to = tmp_path / "run", tmp_path / "exported"
        run.mkdir(exist_ok=True)
        to.mkdir(exist_ok=True)
        recipe = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
        (run / RECIPE).write_text(recipe.replace("root: data/mini/train", f"root: {tmp_path}/train"), encoding="utf-8")
        told = results(OUTCOMES, means={"overall": {"score": 0.5, "interval": [0.2, 0.8]}})
        told["sets"]["Names"]["interval"] = [0.3, 0.95]
        told["model"]["path"] = str(run / "model")
        io.write_json(run / RESULTS, {**told, "examples": {"Names": [{"image": str(tmp_path)}]}, "timing": {"seconds": 1}})
        record_of(str(run)).write(to)
        settings = {"model": {"pooling": "last"}, "base": None, "query_instruction": "Find it:", "target_instruction": ""}
        io.write_json(to / SETTINGS, {**settings, "export": {**ABOUT, **about}})
        return to

    return make


def test_the_hub_reads_what_was_measured(exported: Callable[..., Path]) -> None:
    card = ModelCard(model_card(exported(), "ann/embedder", "mit"))
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == ("mit", "owner/base", "finetune")
    assert card.data.library_name == "sentence-transformers" and card.data.model_name == "embedder"
    found = {entry.dataset_config: entry for entry in card.data.eval_results}
    assert {name: found[name].metric_value for name in OUTCOMES} == {"Names": 75.0, "Icons": 25.0}
    assert "overall" in found and "95 % interval" in found["Names"].metric_name


def test_an_adapter_says_what_it_adapts_and_a_base_of_ones_own_is_not_named(exported: Callable[..., Path]) -> None:
    folder = exported(form="adapter")
    io.write_json(folder / SETTINGS, {**io.read_json(folder / SETTINGS), "base": {"path": "owner/base", "revision": None}})
    assert ModelCard(model_card(folder, "ann/x", "mit")).data.base_model_relation == "adapter"
    assert "base_model" not in model_card(exported(base=None), "ann/x", "mit").partition("\n---")[0]


def test_no_place_on_this_machine_gets_out(exported: Callable[..., Path], tmp_path: Path) -> None:
    folder = exported()
    texts = [model_card(folder, "ann/x", "mit"), *(file.read_text(encoding="utf-8") for file in folder.iterdir())]
    assert not [text for text in texts if str(tmp_path) in text or "/tmp" in text]
    assert "root: train" in (folder / RECIPE).read_text() and "timing" not in io.read_json(folder / RESULTS)


def test_the_card_is_the_same_for_the_same_folder_and_names_the_repository(exported: Callable[..., Path]) -> None:
    folder = exported()
    card = model_card(folder, "ann/embedder", "mit")
    assert card == model_card(folder, "ann/embedder", "mit")
    for words in ('from_pretrained("ann/embedder")', "| Names |", "75.0 [", "digest", "Find it:", "Texts are cut.", "global_batch: 64"):
        assert words in card, words


def test_a_card_without_a_run(exported: Callable[..., Path]) -> None:
    folder = exported()
    for name in (RECIPE, RESULTS):
        (folder / name).unlink()
    card = model_card(folder, "ann/embedder", "mit")
    assert "model-index" not in card and "## Scores" not in card and "## Training" not in card
