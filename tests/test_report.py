"""Reports: the structure of the page, numbers and escaping; looks are judged by eye."""

from __future__ import annotations

import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm2vec.errors import InputError
from vlm2vec.report import charts, gallery, markdown, render, summary, table, thumbnails, write_report

EVIL = "<script>alert('x')</script> & \"quotes\""
SETS = {  # name: (meta-task, split, score, before, chance)
    "Groceries": ("classification", "IND", 0.593, 0.012, 0.0123),
    "A very long name of a classification set": ("classification", "OOD", 1.0, 0.10, 0.10),
    "DigitQuestions": ("vqa", "IND", 0.412, 0.051, 0.001),
    "NameToIcon": ("retrieval", "OOD", 0.0, 0.004, 0.001),
}
VOID_TAGS = {"img", "meta", "br", "wbr", "link"}


class Page(HTMLParser):
    """All elements in order, the text, and a check that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def item(text: str, image: str | None = None) -> dict[str, Any]:
    return {"text": text, "image": image}


def examples() -> list[dict[str, Any]]:
    """A hit with pictures, among them a missing one and one outside the root, and a miss with words."""
    shown = [item("<|image_1|>\nRepresent the given image.", path) for path in ("b.png", "gone.png", "../b.png", "a.png", "b.png")]
    words = [item(EVIL), item("café au lait"), item("تفاحة"), item("x" * 999), item("")]
    scores = [0.912, 0.8, 0.7, 0.6, 0.5]
    hit = {"query": item("<|image_1|>\nFind what this is: one", "a.png"), "hit": True, "gold_rank": 1, "retrieved": shown}
    miss = {"query": item(f"<|image_1|>\nFind what this is: {EVIL}", "a.png"), "hit": False, "gold_rank": 37, "retrieved": words}
    for example in (hit, miss):
        ranked = zip(example["retrieved"], scores, strict=True)
        example["retrieved"] = [{**found, "score": score, "gold": example["hit"] and score > 0.9} for found, score in ranked]
    return [hit, miss]


def results(column: int = 2) -> dict[str, Any]:
    """A results file; `column` 2 is after training and 3 before."""
    sets = {}
    for name, row in SETS.items():
        score = row[column]
        interval = [max(0.0, score - 0.03), min(1.0, score + 0.03)]
        sets[name] = {"meta_task": row[0], "split": row[1], "metric": "precision@1", "score": score, "interval": interval, "chance": row[4]}
        sets[name] |= {"n": 600, "candidates": 1000, "ties": 3, "metrics": {"hit@1": score, "mrr@10": min(1.0, score + 0.1)}}
    mean = {"score": 0.5, "interval": [0.48, 0.52]} if column == 2 else {"score": 0.04, "interval": [0.03, 0.05]}
    means = dict.fromkeys(("classification", "vqa", "retrieval", "IND", "OOD", "overall", "macro"), mean)
    return {
        "format": 2,
        "suite": "mini",
        "description": f"Not MMEB. {EVIL}\n\nSecond paragraph.",
        "protocol": {"ties": "pessimistic", "bootstrap": 1000},
        "protocol_digest": "cafe" * 16,
        "model": {"path": f"runs/{EVIL}", "fingerprint": "feed" * 16, "recipe_digest": None, "dims": 512},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "sets": sets,
        "means": means,
        "grid": [],
        "missing": [],
        "warnings": [],
        "examples": {name: examples() for name in SETS},
        "timing": {"encode_seconds": 9.5, "sets": {"Groceries": 1.0, "NameToIcon": 7.25}},
    }


def log(steps: int = 50) -> list[dict[str, Any]]:
    constant = {"positive_similarity": 0.5, "negative_similarity": 0.1, "temperature": 0.02}
    return [{"step": step, "loss": 5.0 / step, "accuracy": 1 - 1 / step, **constant} for step in range(1, steps + 1)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    Image.new("RGB", (40, 20), "red").save(root / "a.png")
    Image.effect_noise((300, 200), 80).save(root / "b.png")
    return root


@pytest.fixture
def page(pictures: Path) -> Page:
    return Page(render(results(), results(3), log(), f"run: {EVIL}", pictures))


def test_write_report_writes_both_files_with_equal_bytes_for_equal_inputs(tmp_path: Path, pictures: Path) -> None:
    first, second = (write_report(tmp_path / name, results(), results(3), log(), "a: 1", pictures) for name in ("one", "two"))
    assert first == {"markdown": tmp_path / "one/report.md", "html": tmp_path / "one/report.html"}
    assert [first[kind].read_bytes() for kind in first] == [second[kind].read_bytes() for kind in second]


def test_page_closes_every_element(page: Page) -> None:
    assert page.stack == []


def test_page_asks_the_network_for_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "action", "xlink:href"}:
                assert value and value.startswith(("data:image/webp;base64,", "#"))
    style = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style


def test_every_link_inside_the_page_has_a_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"] for attributes in page.all("a")} <= {f"#{name}" for name in ids}


def test_headings_descend_without_a_gap_from_one_h1(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))


def test_pictures_have_alternative_texts_sizes_and_decode(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 5 * len(SETS)  # the two queries' and three of the hit's candidates; missing and outside ones are cards
    for attributes in images:
        assert attributes["alt"] and ": " in attributes["alt"]
        data = base64.b64decode((attributes["src"] or "").partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (int(attributes["width"] or 0), int(attributes["height"] or 0))
            assert max(picture.size) <= 160
    drawings = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(drawings) == 3 and all(attributes["aria-label"] for attributes in drawings)


def test_a_picture_that_cannot_be_shown_becomes_a_card(page: Page) -> None:
    assert page.text.count("picture missing") == 2 * len(SETS)
    assert page.text.count("gone.png") == len(SETS)


def test_without_a_picture_folder_every_picture_is_a_card() -> None:
    page = Page(render(results()))
    assert not page.all("img") and page.text.count("picture missing") == 7 * len(SETS)


def test_texts_from_data_are_escaped(page: Page) -> None:
    assert not page.all("script")
    text = "".join(page.text)
    assert text.count(EVIL) >= 2 * len(SETS) + 3  # queries and candidates; description, model and recipe
    assert f"runs/{EVIL}" in text and f"run: {EVIL}" in text


def test_characters_a_page_cannot_hold_are_replaced(tmp_path: Path) -> None:
    after = results()
    after["suite"] = "mini\ud800\x00\x1b[2J"
    text = write_report(tmp_path, after)["html"].read_text(encoding="utf-8")
    assert "mini\ufffd\ufffd\ufffd[2J" in text
    assert "\x1b" not in table(after) + markdown(after)


def test_numbers_are_present(page: Page) -> None:
    text = " ".join("".join(page.text).split())
    for expected in ("59.3", "56.3–62.3", "+58.1*", "1.2", "600", "1,000", "0.91", "37", "cafecafecafe"):
        assert expected in text
    assert "Macro precision@1 rose from 4.0 to 50.0 %, +46.0 points; the 95 % intervals do not overlap." in text
    assert "3 of 4 sets are better beyond their intervals." in text and "Not clearly above chance: NameToIcon." in text


def test_hits_misses_and_gold_are_marked_by_words(page: Page) -> None:
    text = page.text
    assert text.count(" Hit") == text.count(" Miss") == text.count("★ gold") == len(SETS)


def test_table_has_caption_and_scopes(page: Page) -> None:
    assert len(page.all("caption")) == 2  # scores, other metrics
    assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row"}
    boxes = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert boxes[0]["tabindex"] == "0" and boxes[0]["role"] == "region" and boxes[0]["aria-label"]


def test_gold_out_of_sight_is_shown_when_the_results_hold_it() -> None:
    after = results()
    after["examples"]["Groceries"][1]["gold"] = item("the right answer")
    assert "the right answer" in Page(render(after)).text


def test_a_report_of_nothing_but_scores_stands() -> None:
    after = results()
    for entry in after["sets"].values():
        entry |= {"interval": None, "chance": None, "metrics": {}}
    missing = [{"name": "Atlas", "problems": ["no such file"]}]
    after |= {
        "missing": missing,
        "examples": {},
        "means": {key: {"score": None, "interval": None} for key in after["means"]},
        "description": "",
    }
    text = "".join(Page(render(after, None, [])).text)
    assert "missing or broken: Atlas" in text and "4 sets were evaluated. Means are withheld" in text
    assert "Training" not in text and "What it retrieved" not in text
    assert "59.3" in table(after) and "Atlas" in table(after) and "59.3" in markdown(after)


def test_an_empty_report_stands() -> None:
    after = results() | {"sets": {}, "means": {}}
    assert "No set was evaluated." in render(after) and "No set was evaluated." in markdown(after)


def test_another_protocol_before_is_called_out() -> None:
    before = results(3) | {"protocol_digest": "beef" * 16}
    for text in (render(results(), before), table(results(), before), markdown(results(), before)):
        assert "different protocols" in text


def test_what_the_evaluation_warned_of_is_told() -> None:
    after, before = results() | {"warnings": [f"vqa: {EVIL}"]}, results(3) | {"warnings": ["collapsed?"]}
    page = Page(render(after, before))
    assert f"vqa: {EVIL}" in page.text and "Before: collapsed?" in page.text
    assert "! Before: collapsed?" in table(after, before) and "Before: collapsed?" in markdown(after, before)


def test_a_set_without_a_before_has_a_dash() -> None:
    before = results(3)
    del before["sets"]["Groceries"]
    line = next(line for line in table(results(), before).splitlines() if "Groceries" in line)
    assert line.split() == ["Groceries", "IND", "-", "59.3", "[56.3-62.3]", "-", "1.2", "600"]
    assert "Groceries" in render(results(), before)


@pytest.mark.parametrize("which", [0, 1])
def test_an_unknown_format_is_refused(which: int) -> None:
    pair = [results(), results(3)]
    pair[which]["format"] = 1
    with pytest.raises(InputError, match="format 1 found, 2 expected"):
        table(*pair)


@pytest.mark.parametrize("before", [None, results(3)])
def test_table_is_aligned_and_fits_100_columns(before: dict[str, Any] | None) -> None:
    lines = table(results(), before).splitlines()
    rows = [line for line in lines if "]" in line]
    assert len(rows) == 3 + 4 + 4  # means of meta-tasks, sets, totals
    assert max(map(len, lines)) <= 100
    for column in range(2 if before else 1):
        assert len({[match.start() for match in re.finditer(r"\[", line)][column] for line in rows}) == 1
    assert "100.0 [97.0-100.0]" in next(line for line in rows if "A very long" in line)


def test_table_lists_sets_under_their_meta_task() -> None:
    names = [line[:27].rstrip() for line in table(results(), results(3)).splitlines()[4:] if "[" in line]
    assert names == [
        *("Classification", "  Groceries", "  A very long name of a cl~"),
        *("Visual question answering", "  DigitQuestions", "Retrieval", "  NameToIcon"),
        *("In-distribution (IND)", "Out-of-distribution (OOD)", "Overall, mean of sets", "Macro, mean of meta-tasks"),
    ]


def test_markdown_escapes_and_lists() -> None:
    after = results()
    after["sets"]["a|b*c"] = after["sets"].pop("Groceries")
    text = markdown(after, results(3), log())
    assert "<script>" not in re.sub("`[^`]*`", "", text) and "`runs/<script>" in text
    assert r"a\|b\*c" in text and r"Not MMEB. \<script\>" in text and "\n\nSecond paragraph." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert "- loss: 5 at the start, 0.1 at the end" in text


def test_chance_of_a_mean_is_the_mean_of_chances() -> None:
    told = summary.summarize(results())
    assert told.groups[0].mean.chance == pytest.approx((0.0123 + 0.10) / 2)
    macro = told.totals[-1]
    assert macro.key == "macro" and macro.chance == pytest.approx(((0.0123 + 0.10) / 2 + 0.001 + 0.001) / 3)
    assert (macro.sets, told.groups[0].mean.sets) == (4, 2)


def test_intervals_that_touch_are_not_apart() -> None:
    score = summary.Score
    rows = [summary.Row("a", "a", score(0.5, low, 0.6), score(0.3, 0.2, 0.4), 0.0) for low in (0.4, 0.41)]
    assert [row.apart for row in rows] == [False, True]
    assert not summary.Row("a", "a", score(0.5), score(0.3), 0.0).apart


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.12345, False, "12.3"),
        (0.1, True, "+10.0"),
        (-0.1, True, "-10.0"),
        (-0.0001, True, "0.0"),
        (None, False, "–"),
        (1.0, False, "100.0"),
    ],
)
def test_percent(value: float | None, signed: bool, text: str) -> None:
    assert summary.percent(value, signed) == text


def test_lead_is_what_all_texts_begin_with_up_to_a_clause() -> None:
    assert gallery.lead(["Find the thing: a cat", "Find the thing: a car"]) == "Find the thing: "
    assert gallery.lead(["Represent this.", "Represent this."]) == "Represent this."
    assert gallery.lead(["a photo of a cat", "a photo of a car"]) == ""
    assert gallery.lead(["Dr. Who", "Dr. No"]) == "" == gallery.lead([])
    assert gallery.lead(["all alone here: x"]) == ""


def test_smoothing_keeps_a_constant_and_a_short_curve() -> None:
    flat = [(float(step), 2.0) for step in range(100)]
    assert charts.smooth(flat) == flat
    assert charts.smooth([(0.0, 1.0), (1.0, 5.0)]) == [(0.0, 1.0), (1.0, 5.0)]
    jagged = [(float(step), float(step % 2)) for step in range(400)]
    assert all(abs(value - 0.5) < 0.1 for _, value in charts.smooth(jagged))


def test_thinning_keeps_the_mean() -> None:
    points = [(float(step), float(step)) for step in range(1200)]
    thin = charts.thin(points, 600)
    assert len(thin) == 600 and thin[0] == (0.5, 0.5) and thin[-1] == (1198.5, 1198.5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 5.3, [0, 2, 4, 6]),
        (0, 0, [0, 0.2]),
        (-0.3, 0.4, [-0.4, -0.2, 0, 0.2, 0.4]),
        (1, 600, [0, 200, 400, 600]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert found == expected


def test_values_that_are_not_finite_are_left_out_of_curves() -> None:
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": None}, {"step": 4}]
    assert charts.series(rows, "loss").points == [(2.0, 1.5)]
    assert "nan" not in render(results(), None, rows).replace("Provenance", "").replace("provenance", "")


def test_curve_places_points_on_the_frame() -> None:
    frame = charts.Frame(0, 10, 0, 1)
    assert frame.at(0, 0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert frame.at(10, 1) == (charts.WIDTH - charts.RIGHT, charts.TOP)


def test_thumbnails_shrink_until_they_fit(pictures: Path) -> None:
    names = ["b.png"] * 10
    roomy = thumbnails.thumbnails(names, pictures)["b.png"]
    tight = thumbnails.thumbnails(names, pictures, budget=10 * len(roomy.uri) // 3)["b.png"]
    assert roomy.width == 160 and tight.width < 160 and len(tight.uri) <= len(roomy.uri) // 3


def test_a_page_with_many_pictures_stays_small(pictures: Path) -> None:
    after = results()
    for index in range(60):
        after["sets"][f"set {index}"] = copy.deepcopy(after["sets"]["Groceries"])
        shown = after["examples"][f"set {index}"] = examples() * 4
        for found in (found for example in shown for found in example["retrieved"]):
            found["image"] = "b.png"
    assert len(render(after, None, log(20000), None, pictures)) < 4_000_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(scheme: str) -> None:
    style = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    blocks = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    colours = blocks[0] | (blocks[1] if scheme == "dark" else {})
    for ground in ("paper", "card"):
        for ink in ("ink", "soft", "link", "hit", "miss"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for mark in ("after", "before", "chance", "gold", "best"):
            assert contrast(colours[mark], colours[ground]) >= 3.0, (mark, ground)
    assert contrast(colours["gold-ink"], colours["gold-paper"]) >= 4.5
    assert min(contrast(colours[ink], colours["own"]) for ink in ("ink", "soft")) >= 4.5


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
