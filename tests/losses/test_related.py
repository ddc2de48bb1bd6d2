"""The list of related pairs against its definition in loops."""

from __future__ import annotations

import random

import pytest
import torch

from vlm2vec.losses.related import Related


def by_definition(positive: list[int], targets: list[int], queries: list[int]) -> set[tuple[int, int]]:
    wanted = {(query, targets[column]) for query, column in zip(queries, positive, strict=True)}
    return {(row, column) for row, query in enumerate(queries) for column, target in enumerate(targets) if (query, target) in wanted}


@pytest.mark.parametrize("side", [1, 3, 100])
@pytest.mark.parametrize("seed", range(20))
def test_finds_what_the_definition_says(seed: int, side: int) -> None:
    """From all different to nearly all equal; ids are any integers."""
    draw = random.Random(seed)
    rows, columns, kinds = draw.randint(1, 12), draw.randint(1, 12), draw.choice([1, 2, 4, 10**15])
    queries = [draw.randrange(kinds) - kinds // 2 for _ in range(rows)]
    targets = [draw.randrange(kinds) - kinds // 2 for _ in range(columns)]
    positive = [draw.randrange(columns) for _ in range(rows)]
    found = Related.find(torch.tensor(positive), torch.tensor(targets), torch.tensor(queries), side, torch.float64)

    pairs = list(zip(found.row_E.tolist(), found.column_E.tolist(), strict=True))
    expected = by_definition(positive, targets, queries)
    assert len(pairs) == len(expected) and set(pairs) == expected
    assert found.query_part_B.tolist() == [1 / queries.count(item) for item in queries]
    assert found.target_part_N.tolist() == [1 / targets.count(item) for item in targets]
    related = {(queries[row], targets[column]) for row, column in expected}
    assert found.unrelated == len(set(queries)) * len(set(targets)) - len(related)

    tiles = [(row // side, column // side) for row, column in pairs]
    corners = [(down, across) for down in range(-(-rows // side)) for across in range(-(-columns // side))]
    assert tiles == sorted(tiles)
    assert found.per_tile == [tiles.count(corner) for corner in corners]


def test_queries_without_ids_all_differ() -> None:
    found = Related.find(torch.tensor([1, 1, 0]), torch.tensor([7, 8]), None, 2, torch.float32)
    assert sorted(zip(found.row_E.tolist(), found.column_E.tolist(), strict=True)) == [(0, 1), (1, 1), (2, 0)]
    assert found.query_part_B.tolist() == [1.0, 1.0, 1.0]
    assert found.query_part_B.dtype == torch.float32
