"""What is held out: never a group in both parts, nothing moved by rows that are added, no row lost or changed."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpora import jsonl
from vlm2vec.cli import main
from vlm2vec.data.own.schema import read_row
from vlm2vec.data.own.split import is_held_out, key_of, split
from vlm2vec.errors import DataError

name = st.sampled_from([f"{letter}.png" for letter in "abcdefgh"])
side = st.fixed_dictionaries({"image": name}) | st.sampled_from(["one", "two", "three"])
extra = {"group": st.integers(0, 5), "negatives": st.lists(side, max_size=1)}
row = st.fixed_dictionaries({"query": side, "positive": side}, optional=extra)


def shown(values: dict[str, Any]) -> set[str]:
    """The oracle: pictures of query and positive."""
    return {each["image"] for each in (values["query"], values["positive"]) if isinstance(each, dict)}


def parts(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[list[Any], list[Any], int]:
    made = split(jsonl(folder / "pairs.jsonl", rows), folder / "split", root=folder, **options)
    return *([json.loads(line) for line in file.read_text().splitlines()] for file in (made.train, made.eval)), made.leaks


@given(st.lists(row, min_size=12, max_size=30), st.lists(row, max_size=10), st.sampled_from([None, "query", "positive", "picture"]))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_torn_apart_or_moved(rows: list[dict[str, Any]], added: list[dict[str, Any]], by: Any) -> None:
    rows = [{**values, "id": number} for number, values in enumerate(rows)]
    added = [{**values, "id": 1000 + number} for number, values in enumerate(added)]
    with TemporaryDirectory() as folder:
        try:
            train, held, leaks = parts(Path(folder), rows, share=0.4, by=by)
            grown = parts(Path(folder), added + rows, share=0.4, by=by)
        except DataError as error:
            assert "is left for" in str(error)
            return
    assert sorted(train + held, key=lambda values: values["id"]) == rows and [each for each in rows if each in train] == train
    keys = [{key_of(read_row(values)[0], by) for values in part} for part in (train, held)]  # type: ignore[arg-type]
    assert not keys[0] & keys[1]
    if by is None:
        assert not {each["group"] for each in train if "group" in each} & {each["group"] for each in held if "group" in each}
    seen = set().union(*map(shown, held))
    assert leaks == sum(bool(shown(values) & seen) for values in train)
    assert [each for each in grown[0] if each["id"] < 1000] == train and [each for each in grown[1] if each["id"] < 1000] == held


def test_what_leaks_can_be_left_out(tmp_path: Path) -> None:
    rows = [{"query": {"image": f"{number}.png"}, "positive": {"image": f"{(number + 1) % 40}.png"}} for number in range(40)]
    train, held, leaks = parts(tmp_path, rows, share=0.3)
    kept, same, again = parts(tmp_path, rows, share=0.3, drop_leaks=True)
    seen = set().union(*map(shown, held))
    assert leaks == again > 0 and same == held and kept == [values for values in train if not shown(values) & seen]


def test_the_share_is_met_and_grows_without_exchange() -> None:
    keys = [str(number) for number in range(20_000)]
    held = {share: {key for key in keys if is_held_out(key, share, 17)} for share in (0.1, 0.3)}
    assert held[0.1] < held[0.3]
    for share, chosen in held.items():
        assert abs(len(chosen) / len(keys) - share) < 4 * (share * (1 - share) / len(keys)) ** 0.5
    assert held[0.1] != {key for key in keys if is_held_out(key, 0.1, 18)}


def test_what_stays_together() -> None:
    def key(by: Any = None, **values: Any) -> str:
        found, _ = read_row({"query": "q", "positive": {"image": "p.png"}, **values})
        assert found is not None
        return key_of(found, by)

    assert key(group="g") == key(group="g", query="other", positive="x") != key(group="h")
    assert key() == key(query="other") != key(positive={"image": "q.png"})  # five captions of one picture
    assert key(query={"image": "p.png"}, positive="label") == key()
    assert key(positive="x") == key(positive="y") != key(positive="x", query="other")
    assert key(by="positive", query="a") == key(by="positive", query="b")
    assert key(by="query", positive="x") == key(by="query", positive="y")


def test_parquet_stays_parquet_with_its_columns(tmp_path: Path) -> None:
    kind = pa.struct({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    pictures = pa.array([{"image": {"bytes": bytes([number]), "path": None}} for number in range(60)], kind)
    table = pa.table({"query": [f"q{number}" for number in range(60)], "positive": pictures}).replace_schema_metadata({"a": "b"})
    pq.write_table(table, tmp_path / "own.parquet", row_group_size=7)
    made = split(tmp_path / "own.parquet", tmp_path / "split", 0.3)
    stored = [pq.read_table(file) for file in (made.train, made.eval)]
    assert tuple(map(len, stored)) == made.rows and min(made.rows) > 5 and stored[0].schema.equals(table.schema, check_metadata=True)
    assert pa.concat_tables(stored).sort_by("query").equals(table.sort_by("query"))


def test_what_cannot_be_split_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "in" / "pairs.jsonl", [{"query": f"q{row}", "positive": "p"} for row in range(20)])
    inside = tmp_path / "in" / "split"
    for to, options, message in (
        (tmp_path / "out", {}, "must lie below"),
        (inside, {"share": 1.0}, "between 0 and 1"),
        (inside, {"share": 1e-9}, "no row of 20 is left for eval"),
        (inside, {"by": "positive", "share": 0.9}, "is left for train"),
        (inside, {"by": "group"}, r"pairs\.jsonl:1: group is missing"),
    ):
        with pytest.raises(DataError, match=message):
            split(file, to, **{"share": 0.5, **options})  # type: ignore[arg-type]
    assert not inside.exists() and list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_the_command_says_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [{"query": f"q{row}", "positive": "p"} for row in range(20)])
    assert main(["data", "split", str(file), "--eval", "0.3", "--to", str(tmp_path / "split")]) == 0
    said = capsys.readouterr().out
    assert "leaks   0 training rows\n" in said and f"--suite {tmp_path / 'split' / 'eval.jsonl'} --root {tmp_path}" in said
    assert main(["data", "split", str(file), "--eval", "0.3", "--to", str(tmp_path / "split"), "--root", "absent"]) == 2
