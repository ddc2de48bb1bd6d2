"""Pairs become distinct features and indices; equal items share a row."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from vlm2vec.backbones import load_backbone
from vlm2vec.batch import Batch, BatchDataset, Whereabouts, make_batch
from vlm2vec.config import ModelConfig
from vlm2vec.data.bad import BadPair
from vlm2vec.data.types import ImageRef, Item, Pair
from vlm2vec.errors import DataError, ImageError

PICTURE = ImageRef(Image.new("RGB", (28, 28), (200, 10, 10)))
CAT, DOG, RED = Item("cat"), Item("dog"), Item(images=(PICTURE,))
PAIRS = [
    Pair("s:0", "s", RED, CAT, (DOG,)),
    Pair("s:1", "s", Item("pet"), DOG),
    Pair("s:2", "s", RED, CAT, (Item("car"), CAT)),
]


def processor():
    return load_backbone(ModelConfig(path="builtin/tiny-qwen2_vl")).processor


def test_equal_items_share_a_row() -> None:
    batch = make_batch(PAIRS, processor())
    assert len(batch.features) == 5  # RED, pet, cat, dog, car
    assert batch.query_B.tolist() == [0, 1, 0]
    assert batch.positive_B.tolist() == [2, 3, 2]
    assert batch.negative_K.tolist() == [3, 4, 2]
    assert batch.pair_ids == ["s:0", "s:1", "s:2"]
    assert len(set(batch.item_id_I.tolist())) == 5


def test_item_ids_are_the_same_wherever_they_are_made() -> None:
    whole, part = make_batch(PAIRS, processor()), make_batch(PAIRS[1:2], processor())
    assert part.item_id_I.tolist() == [whole.item_id_I[1].item(), whole.item_id_I[3].item()]


def test_negatives_can_be_left_out() -> None:
    batch = make_batch(PAIRS, processor(), explicit_negatives=False)
    assert len(batch.negative_K) == 0 and len(batch.features) == 4


class _Rows(list):
    def id(self, index: int) -> str:
        return f"s:{index}"


class _Mixture:
    """One source; batch 0 is all of it, shared out row by row."""

    def __init__(self, pairs: Sequence[Pair] = PAIRS) -> None:
        self.sources = (_Rows(pairs),)

    def draws(self, index: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        return np.array([(0, row) for row in range(len(self.sources[0]))[rank::world_size]])


def test_a_batch_survives_the_way_to_a_worker_and_back() -> None:
    dataset = pickle.loads(pickle.dumps(BatchDataset(_Mixture(), processor(), True, 1, 2)))
    batch = pickle.loads(pickle.dumps(dataset[0]))
    assert batch.pair_ids == ["s:1"]
    assert torch.equal(batch.features[0].input_ids, make_batch(PAIRS[1:2], processor()).features[0].input_ids)


BAD = Pair("s:1", "s", Item("never seen"), Item(images=(ImageRef(b"", "s row 1: image 'x.png'"),)))


def equal(one: Batch, other: Batch) -> bool:
    tensors = [(batch.item_id_I, batch.query_B, batch.positive_B, batch.negative_K) for batch in (one, other)]
    return all(map(torch.equal, *tensors)) and len(one.features) == len(other.features)


def test_a_bad_pair_is_replaced_by_the_next_one_and_leaves_nothing_behind() -> None:
    found = BatchDataset(_Mixture([PAIRS[0], BAD, PAIRS[2]]), processor(), True, 0, 1, skip=1)[0]
    assert equal(found, make_batch([PAIRS[0], PAIRS[2], PAIRS[2]], processor()))
    assert found.bad == [BadPair("s:1", "s row 1: image 'x.png': not an image (the file is empty)", "s:2")]


def test_the_last_row_is_followed_by_the_first_and_bad_ones_are_passed_over() -> None:
    found = BatchDataset(_Mixture([PAIRS[0], BAD, BAD]), processor(), True, 0, 1, skip=2)[0]
    assert equal(found, make_batch([PAIRS[0]] * 3, processor()))
    assert [(bad.id, bad.replaced_by) for bad in found.bad] == [("s:1", "s:0"), ("s:2", "s:0"), ("s:2", "s:0")]


@pytest.mark.parametrize("pairs", [[PAIRS[0], BAD, BAD, PAIRS[1]], [BAD]])
def test_too_many_in_a_row_are_an_error_that_travels(pairs: list[Pair]) -> None:
    error = pickle.loads(pickle.dumps(BatchDataset(_Mixture(pairs), processor(), True, 0, 1, skip=1)[0]))
    assert isinstance(error, DataError) and "in a row from s:" in str(error) and "not an image (the file is empty)" in str(error)


def test_without_leave_to_skip_the_error_names_the_picture_and_the_key() -> None:
    error = BatchDataset(_Mixture([BAD]), processor(), True, 0, 1)[0]
    assert isinstance(error, ImageError)
    assert str(error) == (
        "s row 1: image 'x.png': not an image (the file is empty); repair it, or replace such pairs with data.bad_pictures=skip"
    )


def test_whereabouts_are_kept_by_workers_only() -> None:
    whereabouts = Whereabouts(2)
    whereabouts.note(0, 1, 2)
    assert whereabouts.of_the_dead(0) == []
