from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vlm2vec.data.tiny import write_tiny
from vlm2vec.errors import DataError
from vlm2vec.suite import load_suite

GOOD = """suite: demo
description: two sets
root: demo
sets:
  - name: one
    meta_task: vqa
    split: IND
    path: eval/one
    query_modality: I+T
    target_modality: T
    queries: 10
    candidates: 5
    source: made up
    licence: CC0-1.0
  - name: two
    meta_task: retrieval
    split: OOD
    path: eval/two
    query_modality: T
    target_modality: I
    queries: 3
    candidates: 2
    source: elsewhere
    licence: MIT
    note: n
train:
  - {name: three, path: train/three, meta_task: vqa, rows: 7}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the suite `demo` under benchmarks/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks/demo").mkdir(parents=True)
    (tmp_path / "benchmarks/demo/datasets.yaml").write_text(GOOD)
    return tmp_path


def test_by_name_by_folder_and_by_file(here: Path) -> None:
    suites = [load_suite(name) for name in ("demo", "benchmarks/demo", here / "benchmarks/demo/datasets.yaml")]
    assert suites[0] == suites[1] == suites[2]
    suite = suites[0]
    assert (suite.name, suite.description, [spec.name for spec in suite.sets]) == ("demo", "two sets", ["one", "two"])
    assert (suite.sets[0].queries, suite.sets[0].note, suite.sets[1].note, suite.train[0].rows) == (10, "", "n", 7)
    assert len(suite.digest) == 64


def test_where_the_data_lie(here: Path) -> None:
    assert load_suite("demo", "given").root == Path("given")
    assert load_suite("demo").root == Path("data/demo")  # nowhere yet
    for place in (Path("data/demo"), Path("demo"), Path("benchmarks/demo/demo")):
        (here / place / "eval/one").mkdir(parents=True)
        assert load_suite("demo").root == place


def test_the_tiny_suite_reads(tmp_path: Path) -> None:
    write_tiny(tmp_path, ["a"], rows=4)
    assert load_suite(tmp_path).root.samefile(tmp_path) and len(load_suite(tmp_path).sets) == 4


def test_an_unknown_suite_lists_what_there_is(here: Path) -> None:
    with pytest.raises(DataError, match=r"no benchmark suite 'dmeo'; did you mean demo\? \(there are: demo"):
        load_suite("dmeo")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    split: IND", "    split: in", r"datasets.yaml:7: sets\[0\].split: expected one of IND, OOD"),
        ("    source: made up", "    sauce: made up", r"datasets.yaml:13: unknown key sets\[0\].sauce; did you mean source\?"),
        ("    licence: CC0-1.0\n", "", r"sets\[0\].licence is required"),
        ("queries: 10", "queries: ten", r"sets\[0\].queries: expected integer, got 'ten'"),
        ("candidates: 5", "candidates: 0", r"sets\[0\] \(one\): candidates must be >= 1, got 0"),
        ("name: two", "name: one", r"sets\[1\] \(one\): name is empty or was used before"),
        ("path: eval/one", "path: ../eval", r"sets\[0\] \(one\): path '../eval' must be a folder below the data root"),
        ("path: train/three", "path: /train", r"train\[0\] \(three\): path '/train' must be"),
        ("rows: 7", "rows: 7, rows: 8", "given twice"),
        (GOOD[GOOD.index("sets:") :], "sets: []\n", "sets is empty"),
    ],
)
def test_a_wrong_row_is_named(here: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    (here / "benchmarks/demo/datasets.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(DataError, match=message):
        load_suite("demo")


def test_only_some_sets(here: Path) -> None:
    suite = load_suite("demo")
    assert [spec.name for spec in suite.only(["two", "one"]).sets] == ["one", "two"]
    with pytest.raises(DataError, match="suite demo has no set 'tow'; did you mean two"):
        suite.only(["tow"])


def test_a_fact_without_its_source_and_a_set_without_its_training_set(here: Path) -> None:
    file = here / "benchmarks/demo/datasets.yaml"
    for found, wanted, problem in (
        ("licence: MIT", "licence: MIT\n    known: {counts: hearsay}", "two.*known.counts names 'hearsay', which is none of the sources"),
        ("licence: MIT", "licence: MIT\n    metric: hit", "two.*unknown metric 'hit'; expected hit,"),
        ("licence: MIT", "licence: MIT\n    train: tree", "two.*train names 'tree', which is no training set"),
    ):
        file.write_text(GOOD.replace(found, wanted))
        with pytest.raises(DataError, match=problem):
            load_suite("demo")


def test_mmeb_is_what_the_paper_says() -> None:
    suite = load_suite("mmeb")
    sizes = Counter(spec.meta_task for spec in suite.sets)
    assert sizes == {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    assert Counter(spec.split for spec in suite.sets) == {"IND": 20, "OOD": 16}
    assert {spec.train for spec in suite.sets if spec.split == "IND"} == {spec.name for spec in suite.train}
    assert all(spec.train is None for spec in suite.sets if spec.split == "OOD") and len(suite.train) == 20
    fewer = {spec.name: spec.candidates for spec in suite.sets if spec.candidates != 1000}
    assert fewer == {"N24News": 24, "HatefulMemes": 2, "VOC2007": 20, "SUN397": 397, "Place365": 365, "ImageNet-R": 200, "ObjectNet": 113,
                     "Country211": 211}  # fmt: skip
    assert {spec.queries for spec in suite.sets} == {1000} and all(spec.known.counts and spec.known.prompts for spec in suite.sets)
    assert [spec.name for spec in suite.train if spec.name not in [other.name for other in suite.sets]] == ["ImageNet_1K"]
