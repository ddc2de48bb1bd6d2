"""For maintainers: `python -m vlm2vec.data.mini.refresh`, after a change of the table or of a pinned package, builds anew and records what
came out in `benchmarks/mini/` (checksums.json, datasets.yaml, sets.md). Read the difference before committing it."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from vlm2vec import io
from vlm2vec.data import mini
from vlm2vec.data.mini import packages, table
from vlm2vec.data.mini.spec import SetSpec
from vlm2vec.data.mini.write import EVAL_FILE, TRAIN_FILE

HEADER = """\
# The sets of the embedded benchmark, counted when `checksums.json` was made. Written by `python -m vlm2vec.data.mini.refresh`
# from vlm2vec/data/mini/table.py, the place to change. README.md beside this file says what each set is, and what it is not.
"""
SETS_PAGE = """\
# The sets, counted

Written by `python -m vlm2vec.data.mini.refresh`. *Chance* is the expected precision@1 of a random ranking. *Blind* is that of giving, with
no look at the picture, the most frequent training answer to the same question (to any, where training does not ask it): what is learnt
about pictures begins above it.

| set | meta-task | | query -> target | training rows | queries | candidates | chance % | blind % | what it is |
|---|---|---|---|--:|--:|--:|--:|--:|---|
"""
DESCRIPTION = "MMEB's protocol and layout on openly licensed pictures. It is not MMEB: scores do not compare with those of MMEB."


def main(folder: Path = mini.FOLDER) -> None:
    """Build in a temporary folder and write checksums and the list of the sets to `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / mini.SUITE
        record = mini.make(root, None)
        sheet = datasets(root, record)
        page = SETS_PAGE + "\n".join(_line(root, row, record["counts"][row["name"]]["train"]) for row in sheet["sets"]) + "\n"
    io.write_json(folder / mini.CHECKSUMS.name, {key: record[key] for key in ("format", "total", "sets", "versions")})
    text = HEADER + yaml.safe_dump(sheet, sort_keys=False, allow_unicode=True, width=150)
    (folder / "datasets.yaml").write_text(text, encoding="utf-8")
    (folder / "sets.md").write_text(page, encoding="utf-8")


def datasets(root: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What `datasets.yaml` says of the benchmark built in `root`."""
    counts = record["counts"]
    train = [
        {"name": spec.name, "path": f"train/{spec.name}", "meta_task": spec.meta_task, "rows": counts[spec.name]["train"]}
        for spec in table.SETS
        if counts[spec.name]["train"]
    ]
    sets = [_row(root, spec) for spec in table.SETS]
    get = f"vlm2vec data get {mini.SUITE}"
    return {"suite": mini.SUITE, "description": DESCRIPTION, "root": mini.SUITE, "get": get, "sets": sets, "train": train}


def _row(root: Path, spec: SetSpec) -> dict[str, Any]:
    sizes = candidates(root, spec.name)
    known = {package.distribution: package for package in packages.PACKAGES}
    return {
        "name": spec.name,
        "meta_task": spec.meta_task,
        "split": spec.split,
        "path": f"eval/{spec.name}",
        "query_modality": spec.query_modality,
        "target_modality": spec.target_modality,
        "queries": len(sizes),
        "candidates": int(statistics.median(sizes)),
        "source": ", ".join(spec.packages),
        "licence": "; ".join(dict.fromkeys(known[name].licence for name in spec.packages)),
        "note": spec.note,
    }


def candidates(root: Path, name: str) -> list[int]:
    """How many candidates each query of a built set has."""
    column = pq.read_table(root / "eval" / name / EVAL_FILE, columns=["tgt_text"]).column(0)
    return [len(cell) for cell in column]


def _line(root: Path, row: dict[str, Any], rows: int) -> str:
    """A set's line of `sets.md`."""
    sizes = candidates(root, row["name"])
    modalities = f"{row['query_modality']} -> {row['target_modality']}"
    percentages = f"{100 * statistics.mean(1 / size for size in sizes):.1f} | {_blind(root, row['name'], row['meta_task'])}"
    counts = f"{rows or ''} | {row['queries']} | {row['candidates']}"
    return f"| {row['name']} | {row['meta_task']} | {row['split']} | {modalities} | {counts} | {percentages} | {row['note']} |"


def _blind(root: Path, name: str, meta_task: str) -> str:
    """precision@1, in percent, of the most frequent training answer to each question; "" where answers do not repeat."""
    file = root / "train" / name / TRAIN_FILE
    if meta_task not in ("classification", "vqa") or not file.exists():
        return ""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in pq.read_table(file, columns=["qry", "pos_text"]).to_pylist():
        answers[row["qry"]][row["pos_text"]] += 1
    everywhere = sum(answers.values(), Counter())
    asked = pq.read_table(root / "eval" / name / EVAL_FILE, columns=["qry_text", "tgt_text"]).to_pylist()
    right = [(answers.get(row["qry_text"]) or everywhere).most_common(1)[0][0] == row["tgt_text"][0] for row in asked]
    return f"{100 * statistics.mean(right):.1f}"


if __name__ == "__main__":
    main()
