"""A comparison in words, tables and on a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.measured import prediction, results, write, write_lines
from tests.test_compare import BASE, OTHER, hits, read
from tests.test_report import EVIL, Page
from vlm2vec import results as files
from vlm2vec.cli import main
from vlm2vec.compare import compare
from vlm2vec.report import comparison_table, write_comparison
from vlm2vec.report.contrast import markdown, sentence
from vlm2vec.report.contrast_page import render, scale_of
from vlm2vec.results import Measured


@pytest.fixture
def both(tmp_path: Path) -> list[Measured]:
    return [read(tmp_path, "base@1", BASE), read(tmp_path, "other@2", OTHER)]


def test_sentence_says_better_worse_noise_or_identical(tmp_path: Path, both: list[Measured]) -> None:
    text = sentence(compare(both).contrasts[0])
    assert text.startswith("B is better than A overall (43.4 against 40.0 %; difference +3.4 points, 95 % interval +")
    assert text.endswith("p < 0.001): more than noise. Of 4 sets 1 differ beyond noise: B is better on Groceries.")
    assert sentence(compare(both[::-1]).contrasts[0]).startswith("B is worse than A overall")
    assert sentence(compare([both[0], both[0]]).contrasts[0]) == "B and A are identical: the same score on each of 800 queries."
    close = read(tmp_path, "close", BASE | {"Names": hits(range(2, 151))})
    text = sentence(compare([both[0], close]).contrasts[0])
    assert text.startswith("The overall difference between B and A is within noise (39.9 against 40.0 %; difference -0.1 points")
    assert text.endswith("No set differs beyond noise.")


def test_table_is_aligned_and_fits_100_columns(tmp_path: Path, both: list[Measured]) -> None:
    third = read(
        tmp_path,
        "a-very-long-name-of-a-model-that-somebody-trained-for-long@123456789abc",
        OTHER,
        model={"path": "x" * 200, "fingerprint": ""},
    )
    text = comparison_table(compare([*both, third]))
    assert max(map(len, text.splitlines())) <= 100
    rows = [line for line in text.splitlines() if "[" in line and "%" not in line]
    assert len(rows) == 2 * (4 + 3 + 4) and len({line.index("[") for line in rows}) == 1
    assert re.search(r"^  Groceries +50\.0 +62\.5 +\+12\.5 \[ \+\d\.\d, +\+\d+\.\d\] +<0\.001 +30/5  better$", text, re.M)
    assert "  Names                      75.0" in text and "within noise" in text and "identical" in text
    assert "corrected by Holm's method for 4 of them" in " ".join(text.split())


def test_what_was_left_out_and_forced_is_told(tmp_path: Path, both: list[Measured]) -> None:
    part = read(tmp_path, "part", {"Groceries": OTHER["Groceries"]}, protocol={"subsets": ["Groceries"], "ties": "reference"})
    comparison = compare([both[0], part], force=True)
    for text in (comparison_table(comparison), markdown(comparison), "".join(Page(render(comparison, [both[0], part])).text)):
        flat = " ".join(text.split())
        assert "Left out, and in no mean here: Icons (only A), Questions (only A), Names (only A)." in flat.replace("\\", "")
        assert "compared by force: ties: pessimistic in A, reference in B" in flat


def test_markdown_has_a_table_per_contrast(both: list[Measured]) -> None:
    text = markdown(compare([*both, both[0]]))
    assert "## B against A" in text and "## C against A" in text and "# A, B and C on mini" in text
    assert "| Groceries | 50.0 | 62.5 | +12.5 |" in text and "**better**" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {10}


def test_scale_is_the_first_round_number_that_holds_every_interval(both: list[Measured]) -> None:
    contrast = compare(both).contrasts[0]
    widest = max(abs(end) for row in contrast.sets for end in row.interval)
    assert 0.1 < widest < 0.2 and scale_of(contrast.sets) == 0.2
    assert scale_of(compare([both[0], both[0]]).contrasts[0].means) == 0.02


def test_page_is_sound(both: list[Measured]) -> None:
    page = Page(render(compare([*both, both[0]]), [*both, both[0]]))
    assert page.stack == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {found["href"] for found in page.all("a")} <= {f"#{name}" for name in ids}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))
    assert not page.all("script") and not page.all("link")


def test_page_shows_who_got_what_right(both: list[Measured]) -> None:
    text = " ".join("".join(Page(render(compare(both), both)).text).split())
    assert "Only B is right" in text and "Only A is right" in text and "30 up, 5 down" in text
    assert text.count("Hit") == text.count("Miss") == 3 + 3 + 3 + 1  # Groceries both ways, Icons three and one
    gained, lost = text.split("Only A is right")[0].split("Only B is right")[1], text.split("Only A is right")[1]
    assert gained.index("Miss") < gained.index("Hit") and lost.index("Hit") < lost.index("Miss")  # A stands above B
    nothing = " ".join("".join(Page(render(compare([both[0]] * 2), [both[0]] * 2)).text).split())
    assert "are identical" in nothing and "Only B" not in nothing


def test_pictures_and_texts_of_the_data_are_shown_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    made = []
    for name, rank in (("one", 2), ("two", 1)):
        line = prediction("Names", 0, float(rank == 1), rank)
        line["query"] = {"text": EVIL, "image": None}
        line["retrieved"][0] |= {"image": "a.png"}
        made.append(files.read(write_lines(tmp_path, name, results({"Names": [float(rank == 1)]}), [line])))
    page = Page(render(compare(made), made, tmp_path))
    assert EVIL in page.text and len(page.all("img")) == 2 and not page.all("script")


def test_files_are_written_and_equal_for_equal_inputs(tmp_path: Path, both: list[Measured]) -> None:
    comparison = compare(both)
    first, second = (write_comparison(tmp_path / name, comparison, both, html=True) for name in ("x", "y"))
    assert {kind: path.name for kind, path in first.items()} == {
        "json": "comparison.json",
        "markdown": "comparison.md",
        "html": "comparison.html",
    }
    assert [path.read_bytes() for path in first.values()] == [path.read_bytes() for path in second.values()]
    assert json.loads(first["json"].read_text())["contrasts"][0]["second"]["name"] == "other@2"
    assert "html" not in write_comparison(tmp_path / "z", comparison, both)


def compare_command(*words: str | Path) -> int:
    return main(["compare", *map(str, words)])


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write(tmp_path, "one", BASE), write(tmp_path, "two", OTHER)
    assert compare_command(one, tmp_path / "two") == 0
    assert "B is better than A overall" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert compare_command(one, two, "--to", tmp_path / "out", "--html", "--root", tmp_path) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["comparison.html", "comparison.json", "comparison.md"]


def test_command_refuses_other_protocols_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"protocol": {"limit": 7}}
    one, two = write(tmp_path, "one", BASE), write(tmp_path, "two", OTHER, **changes)
    assert compare_command(one, two) == 2 and "limit: none in A, 7 in B" in capsys.readouterr().err
    assert compare_command(one, two, "--force") == 0 and "compared by force" in " ".join(capsys.readouterr().out.split())
    assert compare_command(one) == 2 and "1 results given" in capsys.readouterr().err
