"""The mixture of a recipe: shares of the ranks, ids without reading, resuming far away, fingerprint and table."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader, Dataset

from vlm2vec.config import DataConfig, SourceConfig
from vlm2vec.data.mixture import Mixture, build_mixture
from vlm2vec.data.mmeb import NEGATIVE, POSITIVE, QUERY, TrainRows
from vlm2vec.data.types import Pair
from vlm2vec.errors import DataError, RecipeError

SIZES = {"CIRR": 120, "NIGHTS": 57, "OK-VQA": 31, "WebQA": 8, "MSCOCO": 3}


def write_source(root: Path, name: str, size: int) -> None:
    texts = [f"{name} {row}" for row in range(size)]
    empty = [""] * size
    columns = {name: empty if name.endswith("path") else texts for name in (*QUERY, *POSITIVE, *NEGATIVE)}
    (root / name).mkdir()
    pq.write_table(pa.table(columns), root / name / "original-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, size in SIZES.items():
        write_source(folder, name, size)
    return folder


def mix(
    root: Path, sources: list[SourceConfig] | None = None, block: int = 0, batch: int = 8, seed: int = 17, negatives: bool = True
) -> Mixture:
    sources = sources or [SourceConfig(name=name) for name in SIZES]
    return build_mixture(DataConfig(root=str(root), sources=tuple(sources), block=block), negatives, batch, seed)


@pytest.mark.parametrize("case", range(200))
def test_ranks_share_the_planned_pairs_equally(root: Path, case: int) -> None:
    rng = random.Random(case)
    names = rng.sample(list(SIZES), rng.randint(1, 5))
    weighted = rng.random() < 0.5
    sources = [
        SourceConfig(name=name, cap=rng.choice([None, 5, 40]), weight=rng.choice([None, 0.5, 2.0]) if weighted else None) for name in names
    ]
    if sources[0].weight is None and weighted:
        sources[0] = SourceConfig(name=names[0], weight=1.0)
    world, block = rng.choice([1, 2, 3, 4, 8]), rng.choice([0, 1, 2, 4])
    used = sum(min(SIZES[source.name], source.cap or 1000) for source in sources)
    batch = world * max(1, block) * rng.randint(1, 3)
    if used < batch:
        with pytest.raises(DataError, match=f"{used} pairs, fewer than one global batch of {batch}"):
            mix(root, sources, block, batch, case)
        return
    mixture = mix(root, sources, block, batch, case)
    drawn: list[str] = []
    for index in range(2 * used // batch):
        shares = [mixture.batch_ids(index, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {batch // world}
        assert sum(shares, []) == mixture.batch_ids(index)
        drawn += sum(shares, [])
    assert len(mixture) == used
    counts = Counter(drawn[:used])
    assert set(counts) <= {source.id(row) for source in mixture.sources for row in range(len(source))}
    if not weighted:
        assert len(counts) == len(drawn[:used])  # no pair twice before every pair came once


def test_pairs_are_those_of_the_ids(root: Path) -> None:
    mixture = mix(root, block=4)
    for rank in (0, 1):
        pairs = mixture.pairs(5, rank, 2)
        assert [pair.id for pair in pairs] == mixture.batch_ids(5, rank, 2)
        assert all(pair.id == pair.query.text.replace(" ", ":") and pair.id.startswith(f"{pair.source}:") for pair in pairs)


def test_resuming_far_away_reads_its_own_batch_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = TrainRows.__getitem__

    def counting(self: TrainRows, index: int) -> Pair:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(TrainRows, "__getitem__", counting)
    mixture = mix(root, block=4)
    mixture.batch_ids(10**6)
    assert read == []
    mixture.pairs(10**6)
    assert len(read) == 8


def _ids_of(batch: list[list[Pair]]) -> list[str]:
    return [pair.id for pairs in batch for pair in pairs]


class _Batches(Dataset[list[Pair]]):
    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __getitem__(self, index: int) -> list[Pair]:
        return self.mixture.pairs(index)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_do_not_change_the_order(root: Path, workers: int) -> None:
    mixture = mix(root, block=2)
    loader = DataLoader(_Batches(mixture), sampler=range(30), batch_size=None, num_workers=workers, collate_fn=list)
    assert _ids_of(list(loader)) == sum((mixture.batch_ids(index) for index in range(30)), [])


def test_a_batch_that_ranks_cannot_share(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.global_batch \(8\) is not divisible by 3 processes; nearest: 6 or 9"):
        mix(root).pairs(0, 0, 3)
    with pytest.raises(RecipeError, match="nearest: 12$"):
        mix(root, block=4).draws(0, 0, 3)


def test_negatives_only_when_the_loss_uses_them(root: Path) -> None:
    assert all(len(pair.negatives) == 1 for pair in mix(root).pairs(0))
    assert all(pair.negatives == () for pair in mix(root, negatives=False).pairs(0))


def test_the_rows_that_a_cap_keeps(root: Path) -> None:
    first = mix(root, [SourceConfig(name="CIRR", cap=8, take="first")])
    assert sorted(first.batch_ids(0)) == [f"CIRR:{row}" for row in range(8)]
    assert sorted(mix(root, [SourceConfig(name="CIRR", cap=8)]).batch_ids(0)) != sorted(first.batch_ids(0))


def test_table(root: Path) -> None:
    weighted = [SourceConfig(name="WebQA", weight=50.0), SourceConfig(name="MSCOCO", weight=0.0)]
    assert mix(root, [SourceConfig(name="pairs", path="CIRR", cap=50), *weighted]).table() == [
        {"name": "pairs", "rows": 120, "cap": 50, "used": 50, "weight": None, "share": 0.5},
        {"name": "WebQA", "rows": 8, "cap": None, "used": 8, "weight": 50.0, "share": 0.5},
        {"name": "MSCOCO", "rows": 3, "cap": None, "used": 3, "weight": 0.0, "share": 0.0},
    ]


def test_the_digest_follows_the_rows_and_nothing_else(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    digest = mix(root).digest
    assert mix(copy, block=4, seed=3).digest == digest
    assert mix(root, [SourceConfig(name=name, cap=2) for name in SIZES]).digest != digest
    shutil.rmtree(copy / "WebQA")
    write_source(copy, "WebQA", 9)
    assert mix(copy).digest != digest


def test_an_unknown_source_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"'ORVQA' not found .*; it holds CIRR, MSCOCO, NIGHTS, OK-VQA, WebQA; did you mean OK-VQA\?"):
        mix(root, [SourceConfig(name="ORVQA")])


def test_made_up_rows_under_the_names_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    mixture = mix(Path("builtin/tiny"), [SourceConfig(name=name, cap=16) for name in SIZES], block=4)
    assert [row["name"] for row in mixture.table()] == list(SIZES)
    pairs = mixture.pairs(0)
    assert len(pairs) == 8 and {pair.source for pair in pairs} <= set(SIZES)
