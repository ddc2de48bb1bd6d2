"""Pairs become distinct features and indices; equal items share a row."""

from __future__ import annotations

import pickle

import torch
from PIL import Image

from vlm2vec.backbones import load_backbone
from vlm2vec.batch import BatchDataset, make_batch
from vlm2vec.config import ModelConfig
from vlm2vec.data.types import ImageRef, Item, Pair

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


class _Mixture:
    def pairs(self, index: int, rank: int = 0, world_size: int = 1) -> list[Pair]:
        return PAIRS[rank::world_size]


def test_a_batch_survives_the_way_to_a_worker_and_back() -> None:
    dataset = pickle.loads(pickle.dumps(BatchDataset(_Mixture(), processor(), True, 1, 2)))
    batch = pickle.loads(pickle.dumps(dataset[0]))
    assert batch.pair_ids == ["s:1"]
    assert torch.equal(batch.features[0].input_ids, make_batch(PAIRS[1:2], processor()).features[0].input_ids)
