"""Sightings on disk against a dictionary in memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.data.own.sightings import Seen

keys = st.integers(0, 40) | st.sampled_from([2**64 - 1, 2**63])


@given(st.lists(st.lists(st.tuples(keys, st.integers(0, 2**50)), max_size=20), max_size=4))
@settings(max_examples=40, deadline=None)
def test_keys_are_grouped_as_a_dictionary_groups_them(added: list[list[tuple[int, int]]]) -> None:
    expected: dict[int, list[int]] = {}
    with Seen() as seen:
        for batch in added:
            seen.add("id", [(f"{key:016x}", place) for key, place in batch])
            seen.add("other", [("0" * 16, 1)])
            for key, place in batch:
                expected.setdefault(key, []).append(place)
        for _ in range(2):  # reading changes nothing
            groups = [part.tolist() for places, starts in seen.grouped("id") for part in np.split(places, starts[1:])]
            assert sorted(groups) == sorted(sorted(places) for places in expected.values())
        assert list(seen.grouped("none")) == []
        seen.add("id", [("1" * 16, 5)])
        assert [5] in [part.tolist() for places, starts in seen.grouped("id") for part in np.split(places, starts[1:])]
