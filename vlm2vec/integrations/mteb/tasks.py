"""The sets of a suite (MMEB's 36, or any other `datasets.yaml`) as retrieval tasks of mteb, which any of its models can run.

A query has its own candidates (`top_ranked`), or the whole corpus where the suite says so. A document is a candidate in canonical form, so
that copies are one. The main score has the name and the value of the harness: the suite's metric, "precision@1" for MMEB, under the rule
that a tie is a miss. mteb's own scores stand beside it; they break ties by the name of the document, which is a hash here.

Others' models read `text`, the words of a row with the instruction as the row holds it, and `image`. Ours read the prompt as it is.

Shape letters: Q queries, M candidates of one query, R relevant ones among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.benchmarks.benchmark import Benchmark, BenchmarkAggregation
from mteb.results import ModelResult
from numpy.typing import NDArray

from vlm2vec import metrics, prompts, ranking
from vlm2vec.data.types import Item
from vlm2vec.errors import DataError
from vlm2vec.evalsets import Task, take_in
from vlm2vec.evaluate import groups_of
from vlm2vec.integrations.mteb.model import PROMPT
from vlm2vec.suite import SetSpec, Suite

SPLIT = "test"
UNSEEN = float(np.finfo(np.float64).min)  # score of a relevant document that did not come up among the best `_top_k`


class SuiteTask(AbsTaskRetrieval):
    """One set of a suite: the only one of `suite`. `limit` and `choice` (a seed) choose queries as `evaluate` does."""

    abstask_prompt = ""  # rows bring their instructions
    suite: Suite
    limit: int | None
    choice: int
    judged: Task
    data_loaded: bool
    _top_k: int

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the set and look at every picture. Raises DataError that lists everything missing or broken."""
        if self.data_loaded:
            return
        intake = take_in(self.suite, limit=self.limit, seed=self.choice)
        if intake.problems:
            raise DataError("\n".join([f"{self.metadata.name}: cannot be scored", *intake.problems[self.suite.sets[0].name]]))
        self.judged = intake.tasks[0]
        _check_modalities(self.judged, intake.items, self.metadata)
        self.dataset = {"default": {SPLIT: _split_data(self.judged, intake.items)}}
        self._top_k = max([self._top_k, *(len(row) for row in self.judged.candidates or [])])
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """The suite's metric, a tie counting against the model, from the scores that the model gave."""
        task = self.judged
        judged = zip(_query_ids(task), _named(task, task.relevant), strict=True)
        score_QM = [_relevant_first(results[query], right) for query, right in judged]
        positions = ranking.positions(score_QM, [np.arange(len(right)) for right in task.relevant], task.grades)
        return {task.spec.metric: float(metrics.per_query(task.spec.metric, positions, task.grades).mean())}


def _relevant_first(found: Mapping[str, float], right: Sequence[str]) -> list[float]:
    """A query's scores (M,): those of its relevant documents (R), then those of the others that came up."""
    known = set(right)
    return [found.get(document, UNSEEN) for document in right] + [score for document, score in found.items() if document not in known]


# -- from canonical form to mteb's -------------------------------------------------------------------------------------------------------


def _query_ids(task: Task) -> list[str]:
    return [str(row) for row in task.rows]


def _split_data(task: Task, items: Mapping[str, Item]) -> RetrievalSplitData:
    queries = _query_ids(task)
    judged = zip(queries, _named(task, task.relevant), task.grades, strict=True)
    return RetrievalSplitData(
        queries=_table(queries, [items[content] for content in task.queries]),
        corpus=_table(task.targets, [items[content] for content in task.targets]),
        # mteb's own metrics take whole grades
        relevant_docs={query: {name: max(1, round(float(grade))) for name, grade in zip(*row, strict=True)} for query, *row in judged},
        top_ranked=None if task.candidates is None else dict(zip(queries, _named(task, task.candidates), strict=True)),
    )


def _named(task: Task, index_QM: Sequence[NDArray[np.int32]]) -> list[list[str]]:
    """Targets by name, a list per query; the names are shared, for a set may list a million."""
    return [[task.targets[index] for index in row] for row in index_QM]


def _table(ids: Sequence[str], items: Sequence[Item]) -> Dataset:
    """The columns that mteb's loaders know, and the prompt as our models read it."""
    columns = {
        "id": list(ids),
        "text": [prompts.words(item) for item in items],
        "image": [_stored(item) for item in items],
        PROMPT: [prompts.render(item, keep_stray=True) for item in items],
    }
    return Dataset.from_dict(columns, Features({name: Image() if name == "image" else Value("string") for name in columns}))


def _stored(item: Item) -> dict[str, Any] | None:
    """The picture of an item, a file or encoded bytes, in the form that `datasets` decodes when asked for it."""
    if not item.images:
        return None
    source = item.images[0].source
    return {"path": str(source), "bytes": None} if isinstance(source, Path) else {"path": None, "bytes": source}


def _check_modalities(task: Task, items: Mapping[str, Item], metadata: TaskMetadata) -> None:
    """DataError where rows hold pictures and the suite says that there are none: mteb would leave them out."""
    sides = zip((metadata.category or "").split("2"), (task.queries, task.targets), strict=True)
    for kinds, contents in sides:
        if "i" not in kinds and any(items[content].images for content in contents):
            raise DataError(f"{metadata.name}: rows have pictures where the suite's modality is text; correct it in its datasets.yaml")
        if any(len(items[content].images) > 1 for content in contents):
            raise DataError(f"{metadata.name}: an item has several pictures, mteb's rows hold one; score this set with vlm2vec eval")


# -- tasks and benchmark -----------------------------------------------------------------------------------------------------------------


def suite_tasks(suite: Suite, *, limit: int | None = None, seed: int = 17) -> list[SuiteTask]:
    """A task "<suite>-<set>" for every set of `suite`; nothing is read yet. `limit` and `seed` choose queries as `evaluate` does."""
    return [_task(suite, spec, limit, seed) for spec in suite.sets]


def _task(suite: Suite, spec: SetSpec, limit: int | None, seed: int) -> SuiteTask:
    """mteb keeps what describes a task in its class, so each set has one."""
    chosen = f"-limit{limit}-seed{seed}" if limit is not None else ""
    metadata = TaskMetadata(
        dataset={"path": f"vlm2vec/{suite.name}", "revision": suite.digest[:16] + chosen},
        name=f"{suite.name}-{spec.name}",
        description=f"{spec.name}, {spec.meta_task}, {spec.split}: {suite.description}",
        type="Any2AnyRetrieval",
        modalities=["text", "image"],
        category=f"{_kinds(spec.query_modality)}2{_kinds(spec.target_modality)}",
        eval_splits=[SPLIT],
        eval_langs=["eng-Latn"],
        main_score=spec.metric,
    )
    attributes = {"metadata": metadata, "suite": suite.only([spec.name]), "limit": limit, "choice": seed, "__doc__": metadata.description}
    return type(f"{SuiteTask.__name__}_{spec.name}", (SuiteTask,), attributes)()


def _kinds(modality: str) -> str:
    """mteb's letters for a side. The rows of MMEB have words everywhere, beside a picture at least those of the instruction."""
    return "it" if "i" in modality.lower() else "t"


def benchmark(suite: Suite, *, limit: int | None = None, seed: int = 17) -> Benchmark:
    """All sets of a suite; its "Mean(Task)" is unweighted over sets, as MMEB counts. `means` gives the others."""
    tasks = suite_tasks(suite, limit=limit, seed=seed)
    averages = (BenchmarkAggregation.MEAN_TASK,)
    return Benchmark(name=suite.name, tasks=tasks, description=suite.description, aggregations=averages, show_zero_shot=False)


def means(result: ModelResult, suite: Suite) -> dict[str, float | None]:
    """The means that the harness reports, from what `mteb.evaluate` gave: by meta-task, IND, OOD, "overall" over sets, "macro" over the
    means of the meta-tasks. None where the score of a set is missing.
    """
    score = {found.task_name.removeprefix(f"{suite.name}-"): float(found.get_score()) for found in result.task_results}
    return {name: _mean(group, score) for name, group in groups_of(suite.sets).items()}


def _mean(group: Sequence[str] | Mapping[str, Sequence[str]], score: Mapping[str, float]) -> float | None:
    """Mean over sets, or over the means of groups of sets."""
    if isinstance(group, Mapping):
        return _known_mean([_mean(members, score) for members in group.values()])
    return _known_mean([score.get(name) for name in group])


def _known_mean(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return fmean(known) if len(known) == len(parts) else None
