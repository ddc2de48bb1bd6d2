"""The benchmark of speed, on a model so small that only its correctness is tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.throughput import ablate, measure, report, run
from benchmarks.throughput import setting as settings
from benchmarks.throughput.ablate import ROWS, VARIANTS, Built, Variant
from benchmarks.throughput.compare import Disagreement, agree
from benchmarks.throughput.floor import Arithmetic
from benchmarks.throughput.measure import Memory, Ratio, Spent, Stages
from benchmarks.throughput.ours import Ours, differs
from benchmarks.throughput.peer import MiniBatch, Peer
from benchmarks.throughput.setting import Setting, table, write_models
from benchmarks.throughput.workloads import KINDS, Workload, make_workload
from vlm2vec.budget import Budget

PAIRS = 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    made = Setting("tiny", PAIRS, "fp32", "sdpa", 256, str(tmp_path_factory.mktemp("throughput")))
    write_models(made)
    return made


@pytest.fixture(scope="module")
def built(setting: Setting, mixed: Workload) -> Callable[[str], Built]:
    """A variant by its name, made once."""
    few = mixed.pairs[:8]
    return cache(lambda name: Built(VARIANTS[name], setting, few))


@pytest.fixture(scope="module")
def mixed(setting: Setting) -> Workload:
    return make_workload("mixed", 2 * PAIRS, setting.entry["scale"], setting.pictures)


@pytest.fixture(scope="module")
def ours(setting: Setting) -> Ours:
    return Ours(setting)


@pytest.fixture(scope="module")
def peer(setting: Setting) -> Peer:
    pytest.importorskip("sentence_transformers")
    return Peer(setting)


# -- data and models


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_decides_pairs_and_pictures(name: str, tmp_path: Path) -> None:
    first, again, other = (make_workload(name, 8, 0.2, tmp_path, seed) for seed in (0, 0, 1))
    keys, others = ([item.key for item in made.items] for made in (first, other))
    assert keys == [item.key for item in again.items] != others
    assert {pair.query.instruction for pair in first.pairs} == {first.instruction}
    assert {len(image.source.read_bytes()) > 500 for item in first.items for image in item.images} <= {True}  # type: ignore[union-attr]


def test_the_mixed_workload_repeats_targets_and_can_be_had_without(mixed: Workload) -> None:
    single = mixed.without_repeats()
    assert len(mixed.distinct) < len(mixed.items) and any(pair.positive.images for pair in mixed.pairs)
    assert 1 < len(single.pairs) < len(mixed.pairs) and len(single.distinct) == len(single.items)


def test_shapes_say_the_same_things() -> None:
    assert len({frozenset(entry) - {"like", "config", "image_processor"} for entry in table().values()}) == 1


# -- the two sides


def test_both_sides_compute_the_same_and_a_difference_stops_the_run(ours: Ours, peer: Peer, mixed: Workload) -> None:
    found = agree(ours, peer, mixed, "fp32")
    assert found["gradient"] < 2e-5 and found["pairs"] > 2
    peer.loss.scale *= 1.001
    try:
        with pytest.raises(Disagreement, match="mixed: the two sides differ"):
            agree(ours, peer, mixed, "fp32")
    finally:
        peer.loss.scale /= 1.001


def test_mini_batches_are_those_that_the_peer_forms(peer: Peer) -> None:
    from sentence_transformers.base.losses.gradcache import _minibatch_ranges

    lengths = [5, 9, 3, 3, 12, 1, 4]
    mask = torch.tensor([[1] * length + [0] * (12 - length) for length in lengths])
    for way in (MiniBatch(rows=3), MiniBatch(tokens=13), MiniBatch(tokens=2)):
        ranges = _minibatch_ranges({"input_ids": mask, "attention_mask": mask}, way.rows or 99, way.tokens)
        assert way.cut(lengths) == [list(range(*each)) for each in ranges]


def test_operations_are_those_that_torch_counts(setting: Setting, mixed: Workload) -> None:
    pytest.importorskip("sentence_transformers")
    eager = replace(setting, attention="eager")  # torch counts no fused kernel of a CPU
    ours, peer = Ours(eager), Peer(eager)
    arithmetic, batch = Arithmetic(ours), ours.prepare(mixed.pairs)
    entries = arithmetic.entries(mixed.distinct, batch.features)
    columns = [[entries[row] for row in rows.tolist()] for rows in (batch.query_B, batch.positive_B)]
    peer.use(MiniBatch(rows=4))
    cuts = [peer.mini_batch.cut([entry.tokens for entry in column]) for column in columns]
    counts = {"ours": arithmetic.ours(entries), "peer": arithmetic.peer(columns, cuts)}
    for name, side, features in (("ours", ours, batch), ("peer", peer, peer.prepare(mixed.pairs))):
        with FlopCounterMode(display=False) as counter:
            side.train(features)
        scores = 3 * 2 * len(mixed.pairs) ** 2 * 64  # of the loss, which the arithmetic leaves out
        assert counter.get_total_flops() == pytest.approx(counts[name]["done"], abs=2 * scores)
    assert counts["ours"]["useful"] < counts["ours"]["done"] < counts["peer"]["done"]
    assert counts["ours"]["padding"] == pytest.approx(ours.said["padding_share"])
    assert arithmetic.forward(entries) < counts["ours"]["useful"]


# -- clocks


def test_stages_share_out_the_whole_time(ours: Ours, peer: Peer, mixed: Workload) -> None:
    for side in (ours, peer):
        before = dict(vars(side))
        stages = Stages()
        with stages(side.stages()):
            spent, _ = measure.spent(lambda: side.train(side.prepare(mixed.pairs)))  # type: ignore[arg-type]  # noqa: B023
        assert sum(stages.seconds.values()) == pytest.approx(spent.passed, rel=0.05)
        for name in ("decode", "process pictures", "towers", "language, pass 1", "language, pass 2", "backward"):
            assert stages.seconds[name] > 0, name
        assert vars(side).keys() - {"said"} == before.keys() - {"said"}


def test_ratios_are_of_what_ran_side_by_side() -> None:
    assert Ratio.of([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == Ratio(2.0, 1.0, 3.0)
    rounds = measure.in_turn([lambda: {"a": Spent(1, 1)}, lambda: {"a": Spent(2, 2)}], 3)
    assert [row["a"].passed for row in rounds[1]] == [2, 2, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of the process")
def test_memory_is_the_growth_at_its_peak() -> None:
    with Memory() as memory:
        kept = torch.zeros(2**24)  # 64 MiB
        kept += 1
        measure.spent(lambda: kept.sum())
    assert memory.growth == pytest.approx(2**26, rel=0.2)


# -- savings


SLOW = pytest.mark.slow  # compiles for a minute; tests/test_compiled.py holds the same on a smaller model


@pytest.mark.parametrize("row", [pytest.param(row, marks=SLOW if row.on == "compiled" else (), id=row.saving) for row in ROWS])
def test_a_saving_does_not_change_the_gradient(row: ablate.Row, setting: Setting, built: Callable[[str], Built]) -> None:
    if not all(VARIANTS[name].offered(setting.recipe) for name in (row.on, row.off)):
        pytest.skip("this version has no such switch")
    on, off = built(row.on), built(row.off)
    assert differs(on.gradients(), off.gradients()) < 1e-6
    assert next(on.ours.encoder.model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_what_is_undone_costs_operations(built: Callable[[str], Built]) -> None:
    """Otherwise an undoing that reaches nothing would show no difference either."""

    def operations(name: str) -> int:
        with FlopCounterMode(display=False) as counter:
            built(name).train()
        return counter.get_total_flops()

    base = operations("ours")
    for name in ("with head", "whole last layer", "towers twice", "every occurrence", "checkpointed"):
        assert operations(name) > base, name
    assert operations("graphs kept") < base and operations("input order") != base


def test_each_variant_has_chunks_of_its_own(setting: Setting, built: Callable[[str], Built]) -> None:
    built("settled").train()
    assert built("settled").ours.step.budget != Ours(setting).step.budget == Budget.given(setting.recipe.train)


def test_a_switch_that_is_not_there_is_not_offered(setting: Setting) -> None:
    assert Variant((("train", "keep_tokens", 5),)).offered(setting.recipe)
    assert not Variant((("train", "no_such_key", True),)).offered(setting.recipe)
    assert not Variant((("model", "attention", "no such kernel"),)).offered(setting.recipe)


# -- the whole


def test_a_run_from_end_to_end(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(run, "ROWS", (ROWS[1], ablate.Row("nothing", "absent", "ours")))
    monkeypatch.setitem(VARIANTS, "absent", Variant((("train", "no_such_key", True),)))
    arguments = ["--shape", "tiny", "--batch", str(PAIRS), "--quick", "--ablate", "--folder", setting.folder]
    results = run.main([*arguments, "--json", str(tmp_path / "out.json"), "--write", str(tmp_path / "page.md")])
    said, page = capsys.readouterr().out, (tmp_path / "page.md").read_text("utf-8")
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == report.plain(results)
    (found,) = results["workloads"]
    assert found["training"]["whole"]["ratio"].low > 0 and found["training"]["settled"]["model"]["ratio"].low > 0
    assert set(found["encoding"]) == {"distinct", "distinct, packed", "as they come", "as they come, packed"}
    assert results["missing"] == ["nothing"] and "$" not in page
    for part in (report.training, report.counts, report.stages, report.ablations):
        assert part(results) in said and part(results) in page


def test_only_one_side_where_the_peer_has_no_class(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: dict[str, Any] = {**table(), "tiny": {**table()["tiny"], "peer": False}}
    monkeypatch.setattr(settings, "table", lambda: shapes)
    results = run.main(["--shape", "tiny", "--batch", str(PAIRS), "--quick", "--folder", setting.folder, "--only", "training"])
    assert "ratio" not in results["workloads"][0]["training"]["whole"] and "| mixed" in report.counts(results)


@pytest.mark.slow
def test_a_child_measures_memory(setting: Setting, mixed: Workload) -> None:
    from benchmarks.throughput.child import memory_of

    found = memory_of(replace(setting, batch=2 * PAIRS), "mixed", "ours")
    assert found["training"] > 2**18
