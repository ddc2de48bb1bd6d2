"""Rows of one's own as pairs for training and as evaluation sets, from JSONL and from parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import jsonl, paint, png
from vlm2vec.config import parse_recipe
from vlm2vec.data.mixture import build_mixture
from vlm2vec.data.mmeb import read_set
from vlm2vec.data.own.read import OwnPairs, is_own, read_own_set, read_pairs
from vlm2vec.data.types import EvalSet, Item
from vlm2vec.errors import DataError, PathError
from vlm2vec.suite import SetSpec, load_suite

ROWS: list[dict[str, Any]] = [
    {"query": "a dog", "positive": {"image": "dog.png"}, "negatives": [{"image": "cat.png"}, "a stone"], "id": "first"},
    {"query": {"image": ["dog.png", "cat.png"], "instruction": "Say what:"}, "positive": ["a dog", "a cat"], "score": 3},
    {"query": "a dog", "positive": {"image": "wolf.png"}, "negatives": [{"image": "dog.png"}], "group": 7, "score": 0.5},
]


def words(item: Item) -> tuple[str, str, tuple[str, ...]]:
    return item.instruction, item.text, tuple(image.source.name if isinstance(image.source, Path) else "bytes" for image in item.images)


def spec(path: str, scope: Any = "global") -> SetSpec:
    shared = {"meta_task": "retrieval", "split": "IND", "query_modality": "any", "target_modality": "any", "source": "s", "licence": "l"}
    return SetSpec(name="own", path=path, scope=scope, queries=0, candidates=0, **shared)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("dog", "cat", "wolf")):
        paint(tmp_path / f"{name}.png", (number * 50, 0, 0))
    jsonl(tmp_path / "pairs.jsonl", ROWS)
    return tmp_path


def pairs(root: Path, *names: str, **options: Any) -> OwnPairs:
    return read_pairs(root, "own", [root / name for name in names or ("pairs.jsonl",)], **options)


def test_every_positive_makes_a_pair(root: Path) -> None:
    found = pairs(root)
    assert [found.id(index) for index in range(len(found))] == ["own:1", "own:2", "own:2.1", "own:3"]
    assert [words(found[index].positive) for index in range(4)] == [
        ("", "", ("dog.png",)),
        ("", "a dog", ()),
        ("", "a cat", ()),
        ("", "", ("wolf.png",)),
    ]
    assert words(found[1].query) == ("Say what:", "", ("dog.png", "cat.png")) and found[1].query == found[2].query
    assert [words(item) for item in found[0].negatives] == [("", "", ("cat.png",)), ("", "a stone", ())]
    assert found[0].positive.key == found[3].negatives[0].key  # equal items are one, as everywhere
    assert pairs(root, negatives=False)[0].negatives == ()


def test_parquet_holds_the_same_and_pictures_inside(root: Path) -> None:
    side = pa.struct({"text": pa.string(), "image": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    inside = [{"bytes": png((9, 9, 9)), "path": "x.png"}]
    rows = [
        {"query": {"text": "a dog"}, "positive": {"image": [{"path": "dog.png"}]}, "negatives": [{"text": "a stone"}], "score": None},
        {"query": {"image": inside}, "positive": {"text": "grey"}, "negatives": None, "score": 2.0},
    ]
    kinds = {"query": side, "positive": side, "negatives": pa.list_(side), "score": pa.float64()}
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()})
    pq.write_table(table, root / "own.parquet")
    found = pairs(root, "own.parquet")
    assert [found.id(0), found.id(1)] == ["own:0", "own:1"]
    assert words(found[0].positive) == ("", "", ("dog.png",)) and words(found[0].negatives[0]) == ("", "a stone", ())
    assert found[1].query.images[0].source == inside[0]["bytes"]
    assert pq.read_table(root / "own.parquet").num_rows == 2 and is_own(root / "own.parquet")


def test_several_files_are_one_source_and_ids_tell_them_apart(root: Path) -> None:
    for shard in range(2):
        jsonl(root / "shards" / f"train-{shard}.jsonl", [{"query": f"q{shard}{row}", "positive": "p"} for row in range(3)])
    found = read_pairs(root, "own", sorted((root / "shards").iterdir()))
    assert [found.id(index) for index in (0, 5)] == ["own:train-0.jsonl:1", "own:train-1.jsonl:3"]
    assert [found[index].query.text for index in (0, 5)] == ["q00", "q12"]


def test_a_cap_keeps_the_first_pairs_or_some(root: Path) -> None:
    jsonl(root / "many.jsonl", [{"query": f"q{row}", "positive": "p"} for row in range(50)])
    first, some = pairs(root, "many.jsonl", cap=5, take="first"), pairs(root, "many.jsonl", cap=5)
    assert [first.id(index) for index in range(5)] == [f"own:{row}" for row in range(1, 6)] and first.total == 50
    assert {some[index].query.text for index in range(5)} == {f"q{int(some.id(index)[4:]) - 1}" for index in range(5)}
    more = pairs(root, "many.jsonl", cap=9)
    assert {some.id(index) for index in range(5)} < {more.id(index) for index in range(9)}


def test_a_recipe_needs_no_key_for_it(root: Path) -> None:
    recipe = parse_recipe(
        f"model: {{path: builtin/toy, train: [language]}}\ntrain: {{steps: 1, global_batch: 2, lr: 1e-4}}\n"
        f"data: {{root: '{root}', sources: [{{name: own, path: pairs.jsonl}}]}}"
    )
    mixture = build_mixture(recipe.data, True, 2, 17)
    assert mixture.table() == [{"name": "own", "rows": 4, "cap": None, "used": 4, "weight": None, "share": 1.0}]
    assert len(mixture.digest) == 64 and {pair.source for pair in mixture.pairs(0)} == {"own"}


def test_the_layout_is_told_by_the_names(root: Path) -> None:
    assert is_own(root / "pairs.jsonl") and not is_own(root) and not is_own(root / "dog.png")
    assert is_own(jsonl(root / "slip.jsonl", [{"query": "a", "postive": "b"}]))  # so that the slip is named, not MMEB's columns
    assert not is_own(jsonl(root / "mmeb.jsonl", [{"qry": "a", "pos_text": "b"}]))
    assert not is_own(jsonl(root / "empty.jsonl", []))


def test_what_is_wrong_stops_training_with_file_and_row(root: Path) -> None:
    jsonl(root / "bad.jsonl", [ROWS[0], {"query": "a", "positive": "b", "scor": 1}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: unknown key 'scor'; did you mean 'score'\?.*data validate"):
        pairs(root, "bad.jsonl")
    (root / "torn.jsonl").write_text('{"query": "a", "positive": "b"}\n\n{"query": ')
    with pytest.raises(DataError, match=r"torn\.jsonl:3: not valid JSON"):
        pairs(root, "torn.jsonl")
    with pytest.raises(DataError, match="no rows"):
        pairs(jsonl(root / "none.jsonl", []).parent, "none.jsonl")
    escape = pairs(jsonl(root / "escape.jsonl", [{"query": "a", "positive": {"image": "../x.png"}}]).parent, "escape.jsonl")
    with pytest.raises(PathError, match=r"own row 1: positive: image '\.\./x\.png': path leaves root"):
        escape[0]


# -- evaluation --------------------------------------------------------------------------------------------------------------------------


def judged(found: EvalSet) -> list[dict[str, float]]:
    """Per query the grade of each relevant candidate, by what it shows."""
    names = ["".join(words(item)[2]) or item.text for item in found.candidates]
    return [
        {names[index]: float(grade) for index, grade in zip(right, grades, strict=True)}
        for right, grades in zip(found.relevant_QR, found.grades_QR, strict=True)
    ]


def test_one_corpus_for_all_with_equal_queries_as_one(root: Path) -> None:
    found = read_set(root, spec("pairs.jsonl"), root / "elsewhere")
    assert [words(item) for item in found.queries] == [("", "a dog", ()), ("Say what:", "", ("dog.png", "cat.png"))]
    assert judged(found) == [{"dog.png": 1.0, "wolf.png": 0.5}, {"a dog": 3.0, "a cat": 3.0}]
    assert [words(item)[1:] for item in found.candidates] == [
        ("", ("dog.png",)),
        ("", ("cat.png",)),
        ("a stone", ()),
        ("a dog", ()),
        ("a cat", ()),
        ("", ("wolf.png",)),
    ]
    assert found.candidates_QM is None


def test_candidates_of_their_own(root: Path) -> None:
    found = read_own_set(root, spec("pairs.jsonl", "local"))
    assert found.candidates_QM is not None and [row.tolist() for row in found.candidates_QM] == [[0, 1, 2], [3, 4], [5, 0]]
    assert judged(found) == [{"dog.png": 1.0}, {"a dog": 3.0, "a cat": 3.0}, {"wolf.png": 0.5}]


def test_the_higher_score_counts_and_templates_are_refused(root: Path) -> None:
    rows = [{"query": "a", "positive": "b", "score": score} for score in (1, 3, 2)]
    assert judged(read_own_set(root, spec(jsonl(root / "graded.jsonl", rows).name))) == [{"b": 3.0}]
    with pytest.raises(DataError, match="leave out query and target"):
        read_own_set(root, SetSpec(**{**vars(spec("pairs.jsonl")), "query": "Find: {text}"}))


def test_a_file_is_a_suite(root: Path) -> None:
    suite = load_suite(root / "pairs.jsonl")
    assert (suite.name, suite.root, suite.sets[0].path, suite.sets[0].scope) == ("pairs", root, "pairs.jsonl", "global")
    held = jsonl(root / "split" / "eval.jsonl", ROWS)
    assert load_suite(held, root).sets[0].path == "split/eval.jsonl"
    assert len(read_set(root, load_suite(held, root).sets[0], root).queries) == 2
    with pytest.raises(DataError, match="not found"):
        load_suite(root / "absent.jsonl")
    with pytest.raises(DataError, match="must lie below"):
        load_suite(root / "pairs.jsonl", root / "split")
