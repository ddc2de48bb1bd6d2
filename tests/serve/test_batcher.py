"""Items of several requests through one model: equal to `encode`, in turns, and nobody pays for another's item."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.serving import Gated, mixed, picture, tiny, until
from vlm2vec.collate import Features
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.encoder import as_item
from vlm2vec.errors import NonFiniteError
from vlm2vec.serve import batcher as module
from vlm2vec.serve.batcher import Batcher
from vlm2vec.serve.counts import Counts
from vlm2vec.serve.limits import Limits
from vlm2vec.serve.refusal import Refusal


@contextmanager
def batching(chunk_tokens: int = 32768, threads: int = 2, **limits: int) -> Iterator[tuple[Gated, Batcher]]:
    model = Gated(tiny())
    batcher = Batcher(model, Limits(**limits), Counts(), chunk_tokens, threads)  # type: ignore[arg-type]
    batcher.start()
    model.sizes.clear()  # of the probe
    try:
        yield model, batcher
    finally:
        model.gate.set()
        batcher.close()


def submit(batcher: Batcher, items: Sequence[Any]) -> Any:
    made = [as_item(item) for item in items]
    return batcher.submit(made, [f"input[{index}]" for index in range(len(made))])


def busy(model: Gated, batcher: Batcher) -> Any:
    """Close the gate with the model behind it, at work on a request of its own."""
    model.gate.clear()
    first = submit(batcher, ["the first"])
    until(lambda: model.sizes == [1])
    return first


def refusal(future: Any) -> Refusal:
    error = future.exception(20)
    assert isinstance(error, Refusal)
    return error


def test_requests_that_wait_together_are_embedded_together_and_equal_encode() -> None:
    asked = [mixed(number)[1] for number in range(12)]
    with batching() as (model, batcher):
        busy(model, batcher)
        futures = [submit(batcher, items) for items in asked]
        until(lambda: len(batcher._ready) == sum(map(len, asked)))
        model.gate.set()
        found = [future.result(20) for future in futures]
    assert model.sizes == [1, sum(map(len, asked))]
    for items, embedded in zip(asked, found, strict=True):
        np.testing.assert_allclose(embedded.rows_ND, tiny().encode(items).numpy(), atol=1e-6, rtol=0)
        assert embedded.tokens == sum(len(module.featurize(tiny().processor, as_item(item))) for item in items)


def test_requests_take_turns_and_batches_keep_to_their_tokens() -> None:
    done: list[str] = []
    with batching(chunk_tokens=64, threads=1) as (model, batcher):
        busy(model, batcher)
        many, one = submit(batcher, [f"text {number}" for number in range(120)]), submit(batcher, ["short"])
        many.add_done_callback(lambda _: done.append("many"))
        one.add_done_callback(lambda _: done.append("one"))
        model.gate.set()
        many.result(20)
    assert done == ["one", "many"]
    least = min(len(tiny().processor.features(text, [])) for text in ("text 1", "short"))
    assert max(model.sizes) <= 64 // least and sum(model.sizes) == 122


def test_a_full_house_refuses_and_empties() -> None:
    with batching(waiting_items=3) as (model, batcher):
        futures = [busy(model, batcher), submit(batcher, ["a", "b"])]
        with pytest.raises(Refusal, match="3 items wait already, at most 3 may") as caught:
            submit(batcher, ["c"])
        assert caught.value.status == 429 and caught.value.headers == {"retry-after": "1"}
        model.gate.set()
        for future in futures:
            future.result(20)
        until(lambda: batcher.waiting == 0)
        submit(batcher, ["c"]).result(20)


def test_what_nobody_waits_for_is_not_embedded() -> None:
    with batching() as (model, batcher):
        first = busy(model, batcher)
        gone, stays = submit(batcher, ["gone"] * 5), submit(batcher, ["stays"])
        until(lambda: len(batcher._ready) == 6)
        assert gone.cancel() and batcher.waiting == 2
        model.gate.set()
        first.result(20), stays.result(20)
        assert model.sizes == [1, 1] and gone.cancelled()
        until(lambda: batcher.waiting == 0)
        assert (batcher._ready_tokens, batcher._ready_bytes) == (0, 0)


def test_what_nobody_waits_for_is_not_prepared_and_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is prepared is of a client that left, and what stays has no room before the model's thread has passed over it."""
    prepared: list[str] = []
    featurize = module.featurize

    def noted(processor: Any, item: Item, **options: Any) -> Features:
        prepared.append(item.text)
        return featurize(processor, item, **options)

    monkeypatch.setattr(module, "featurize", noted)
    monkeypatch.setattr(module, "AHEAD_BYTES", 1)
    with batching() as (model, batcher):
        busy(model, batcher)
        gone, stays = submit(batcher, ["gone"] * 50), submit(batcher, ["stays"])
        until(lambda: "gone" in prepared)
        assert gone.cancel()
        model.gate.set()
        stays.result(20)
        for _ in range(20):
            submit(batcher, ["next"]).result(20)
    assert prepared.count("gone") < 10


def test_items_of_a_request_that_is_refused_already_are_not_tried_alone() -> None:
    def fail(features: Features) -> None:
        if features.input_ids.tolist() == bad:
            raise NonFiniteError("nan")

    bad = tiny().processor.features("bad", []).input_ids.tolist()
    with batching(threads=1) as (model, batcher):
        model.fail = fail
        busy(model, batcher)
        broken = submit(batcher, ["bad", "fine", "good"])
        until(lambda: len(batcher._ready) == 3)
        model.gate.set()
        assert refusal(broken).param == "input[0]"
        submit(batcher, ["next"]).result(20)
    assert model.sizes == [1, 3, 1, 1]


@pytest.mark.parametrize("error, status", [(NonFiniteError("secret words"), 422), (RuntimeError("secret words"), 500)])
def test_an_item_that_breaks_the_model_fails_alone(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    bad = tiny().processor.features("bad", []).input_ids.tolist()

    def fail(features: Features) -> None:
        if features.input_ids.tolist() == bad:
            raise error

    with batching() as (model, batcher), caplog.at_level(logging.DEBUG):
        model.fail = fail
        busy(model, batcher)
        good, broken = submit(batcher, ["good", "fine"]), submit(batcher, ["good", "bad"])
        until(lambda: len(batcher._ready) == 4)
        model.gate.set()
        np.testing.assert_allclose(good.result(20).rows_ND, tiny().encode(["good", "fine"]).numpy(), atol=1e-6, rtol=0)
        found = refusal(broken)
        assert found.status == status and found.param == "input[1]" and "secret" not in found.message
        until(lambda: batcher.waiting == 0)
        assert batcher.healthy
    assert "secret" not in caplog.text


def test_a_model_that_fails_on_everything_is_not_healthy_until_it_works_again() -> None:
    def fail(features: Features) -> None:
        raise RuntimeError("device lost")

    with batching() as (model, batcher):
        works, model.fail = model.fail, fail
        assert refusal(submit(batcher, ["a"])).status == 500
        until(lambda: not batcher.healthy)
        model.fail = works
        submit(batcher, ["a"]).result(20)
        assert batcher.healthy


def test_items_that_cannot_be_prepared_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with batching(chunk_tokens=40, pixels=10_000) as (_, batcher), caplog.at_level(logging.DEBUG):
        for item, status, words in [
            ({"image": b"<!doctype html><p>secret"}, 400, "input[0]: image: not an image (looks like HTML"),
            ({"image": b"<svg xmlns='x'></svg>"}, 400, "looks like SVG"),
            ({"image": picture(1, (101, 100))}, 400, "10,100 pixels, at most 10,000"),
            ({"image": picture(1)[:-30]}, 400, "truncated or damaged"),
            ({"text": "\ud800"}, 400, "lone surrogate"),
            ({"text": "a b c d e f g h " * 10}, 413, "at most 40"),
        ]:
            found = refusal(submit(batcher, [item]))
            assert found.status == status and words in found.message and found.param == "input[0]"

        def broken(*arguments: Any, **options: Any) -> Features:
            raise ValueError("secret words")

        monkeypatch.setattr(module, "featurize", broken)
        found = refusal(submit(batcher, ["a"]))
        assert found.status == 422 and "ValueError" in found.message
        assert "secret" not in caplog.text + found.message
        until(lambda: batcher.waiting == 0)


def test_texts_prepared_ahead_are_bounded() -> None:
    size = len(tiny().processor.features("text 100", []))
    with batching(chunk_tokens=64) as (model, batcher):
        busy(model, batcher)
        future = submit(batcher, [f"text {number}" for number in range(200)])
        until(lambda: batcher._ready_tokens >= 2 * 64)
        time.sleep(0.1)  # for more to come that should not
        assert batcher._ready_tokens <= 2 * 64 + 3 * size
        model.gate.set()
        future.result(20)


def test_pictures_prepared_ahead_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD_BYTES", 20_000)
    shown = Item("", (ImageRef(picture(1, (60, 60))),))
    size = module.featurize(tiny().processor, shown).nbytes
    with batching(threads=2) as (model, batcher):
        busy(model, batcher)
        future = submit(batcher, [shown] * 40)
        until(lambda: batcher._ready_bytes >= 20_000)
        time.sleep(0.1)  # for more to come that should not
        assert 20_000 <= batcher._ready_bytes <= 20_000 + 3 * size < 40 * size
        model.gate.set()
        future.result(20)


def test_nothing_of_a_request_is_held_once_it_is_answered() -> None:
    """Pictures and features of a batch may be hundreds of megabytes."""

    def held() -> bool:
        gc.collect()
        return any(type(each) is module.Job and each.items[0].text == "held" for each in gc.get_objects())

    with batching() as (_, batcher):
        submit(batcher, ["held", {"image": picture(1)}]).result(20)
        until(lambda: not held())


def test_after_closing_nothing_is_taken() -> None:
    with batching() as (_, batcher):
        batcher.close()
        with pytest.raises(Refusal, match="stopping") as caught:
            submit(batcher, ["a"])
        assert caught.value.status == 503
