"""Chat prompts: the ids that transformers makes of the rendered template, and words that cannot become part of the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backbones.common import embed, picture, stock_processor
from tests.backbones.test_golden import STOCK, native_states
from vlm2vec.backbones.base import Backbone, Processor
from vlm2vec.backbones.chat import SLOT
from vlm2vec.backbones.toy import CHAT
from vlm2vec.batch import featurize
from vlm2vec.cache import content_digest
from vlm2vec.data.types import ImageRef, Item
from vlm2vec.encoder import Encoder
from vlm2vec.errors import DataError, ModelError

Tiny = Callable[..., Backbone]
PLAIN = "{% for turn in messages %}{% for part in turn.content %}"
# Templates in the manner of each family: who folds the system turn into the user's, trims texts, or shows pictures first.
TEMPLATES = {
    "qwen2_vl": CHAT.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": CHAT.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "smolvlm": "<|im_start|>" + PLAIN + "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}Assistant:",
    "internvl": CHAT.replace("PICTURE", "<IMG_CONTEXT>\n"),
    "llava_onevision": PLAIN + "{% if part.type == 'image' %}<image>{% endif %}{% endfor %}\n"
    "{% for part in turn.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}",
    "llava_next": PLAIN
    + "{% if part.type == 'image' %}[INST] <image>{% else %}\n{{ part.text }} [/INST]{% endif %}{% endfor %}{% endfor %}",
    "gemma3": "{{ bos_token }}<start_of_turn>user\n" + PLAIN + "{% if part.type == 'image' %}<start_of_image>{% else %}"
    "{{ part.text | trim }}\n\n{% endif %}{% endfor %}{% endfor %}<end_of_turn>\n<start_of_turn>model\n",
    "mllama": "{{ bos_token }}" + PLAIN + "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}",
}
CONTENTS = [("a red apple", []), ("<|image_1|>\nWhat is this?\n", [(90, 60)]), ("<|image_1|>", [(64, 64)])]


def chatty(tiny: Tiny, model_type: str, template: str = "", **options: Any) -> Backbone:
    """A miniature with a chat template of ours."""
    backbone = tiny(model_type)
    processor = backbone.processor
    processor.tokenizer.chat_template = template or TEMPLATES[model_type]
    options = replace(processor.options, prompt="chat", **options)
    backbone.processor = type(processor)(processor.tokenizer, processor.image_processor, options, backbone.model.config, processor.assets)
    return backbone


def messages(system: str, prompt: str, pictures: int) -> list[dict[str, Any]]:
    words = prompt.replace("<|image_1|>", "").strip("\n")
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": words}] * bool(words)
    return [{"role": "system", "content": [{"type": "text", "text": system}]}] * bool(system) + [{"role": "user", "content": content}]


@pytest.mark.parametrize("model_type", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Represent the user's input."])
@pytest.mark.parametrize(("prompt", "sizes"), CONTENTS, ids=["text", "both", "picture"])
def test_ids_are_those_of_the_rendered_template(
    tiny: Tiny, model_type: str, system: str, prompt: str, sizes: list[tuple[int, int]]
) -> None:
    backbone = chatty(tiny, model_type)
    processor, images, stock = backbone.processor, [picture(*size) for size in sizes], STOCK[model_type]
    rendered = processor.tokenizer.apply_chat_template(messages(system, prompt, len(images)), tokenize=False, add_generation_prompt=True)
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    made = stock_processor(stock.name, **parts, **stock.options)
    begins = rendered.startswith(processor.tokenizer.bos_token or "nothing")  # a stock processor would put a second one in front
    batch = made(text=[rendered], images=[images] if images else None, return_tensors="pt", add_special_tokens=not begins)
    ours = processor.features(prompt, images, system)
    assert ours.input_ids.tolist() == batch["input_ids"][0].tolist()
    assert embed(backbone, [ours]).isfinite().all()


def text_of(processor: Processor, ids: torch.Tensor) -> str:
    """The prompt in words, the tokens of a picture once."""
    runs = [token for at, token in enumerate(ids.tolist()) if token != processor.image_token_id or ids[at - 1] != token]
    return processor.tokenizer.decode(runs)


def test_the_prompt_of_qwen3_vl_embedding(tiny: Tiny) -> None:
    backbone = tiny("qwen3_vl", prompt="chat", system="Represent the user's input.")
    image = ImageRef(picture(64, 64))
    for item, system in ((Item("a cat", (image,)), "Represent the user's input."), (Item("a cat", (image,), "Find it."), "Find it.")):
        assert text_of(backbone.processor, featurize(backbone.processor, item).input_ids) == (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_the_prompt_of_gme_ends_with_the_end_of_text(tiny: Tiny) -> None:
    processor = tiny("qwen2_vl", prompt="chat", system="You are a helpful assistant.", ending="<|endoftext|>").processor
    ids = featurize(processor, Item("a cat")).input_ids
    assert text_of(processor, ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
    assert ids[-1] == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_nothing_that_an_item_says_becomes_a_control_token(tiny: Tiny, model_type: str) -> None:
    processor = chatty(tiny, model_type, max_tokens=5000).processor
    control = set(processor.tokenizer.added_tokens_decoder)
    hostile = "".join(token.content for token in processor.tokenizer.added_tokens_decoder.values()) + SLOT.format(0) + "{{ bos_token }}"
    plain, odd = (processor.features(f"<|image_1|>{words}", [picture(64, 64)], words) for words in ("x", hostile))
    assert [token for token in odd.input_ids.tolist() if token in control] == [t for t in plain.input_ids.tolist() if t in control]
    assert processor.tokenizer.decode(odd.input_ids, skip_special_tokens=False).count(hostile) == 2


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_a_cut_chat_loses_neither_picture_nor_format(tiny: Tiny, model_type: str) -> None:
    processor = chatty(tiny, model_type, system="Say what.").processor
    prompt, image = "<|image_1|>\nWhat is this?\n", picture(90, 60)
    whole = processor.features(prompt, [image]).input_ids.tolist()
    own = [*processor._encode("Say what."), *processor._encode("What is this?")]
    for limit in range(1, len(own) + 2):
        processor.options = replace(processor.options, max_tokens=limit)
        cut = processor.features(prompt, [image])
        assert len(cut) == len(whole) - max(0, len(own) - limit)
        assert cut.truncated == max(0, len(own) - limit)
        left = iter(cut.input_ids.tolist())
        control = [token for token in whole if token in processor.tokenizer.added_tokens_decoder]
        assert all(token in left for token in control)  # all are there, in their order
    assert cut.input_ids.tolist() == whole


def test_states_of_a_chat_are_those_of_the_model_itself(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl", prompt="chat")
    batch = backbone.processor.collate([backbone.processor.features("<|image_1|>\nhi\n", [picture(90, 60)], "Say.")])
    types = (batch["input_ids"] == backbone.model.config.image_token_id).int()
    native = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    with torch.no_grad():
        assert (backbone.hidden(batch) - native_states(backbone, {**native, "mm_token_type_ids": types})).abs().max() <= 1e-5


def test_raw_prompts_do_not_read_the_template(tiny: Tiny) -> None:
    raw, chat = (tiny("qwen2_vl", prompt=prompt).processor for prompt in ("raw", "chat"))
    ids = raw.features("a cat", []).input_ids.tolist()
    assert ids == raw.tokenizer.convert_tokens_to_ids(["a", "Ġ", "c", "a", "t"]) != chat.features("a cat", []).input_ids.tolist()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for turn in messages %}{{ turn.content[-1].text }}{% endfor %}", "leaves out a text or a picture"),
        ("{% for turn in messages %}{{ turn.content }}{% endfor %}", "leaves out a text or a picture"),
        ("{{ raise_exception('no system turn') }}", "refuses a prompt .no system turn."),
    ],
)
def test_a_template_that_loses_a_part_of_the_prompt_is_refused(tiny: Tiny, template: str, words: str) -> None:
    processor = chatty(tiny, "qwen2_vl", template).processor
    with pytest.raises(ModelError, match=f"{words}.*; use model.prompt: raw"):
        processor.features("one <|image_1|> two", [picture(64, 64)])


def test_a_model_without_a_template_has_no_chat(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="the model has no chat template; use model.prompt: raw"):
        tiny("paligemma", prompt="chat")


def test_a_template_in_a_file_of_its_own_is_found(tiny: Tiny) -> None:
    backbone = tiny("qwen2_vl")
    parts = backbone.processor
    parts.tokenizer.chat_template = None
    assets = {"chat_template.json": json.dumps({"chat_template": "<|im_start|>{{ messages[0].content[0].text }}"})}
    options = replace(parts.options, prompt="chat")
    processor = type(parts)(parts.tokenizer, parts.image_processor, options, backbone.model.config, assets)
    assert text_of(processor, processor.features("hi", []).input_ids) == "<|im_start|>hi"


def test_an_empty_chat_is_refused(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="neither text nor image"):
        tiny("qwen2_vl", prompt="chat", system="Say.").processor.features("\n", [])


def test_the_prompt_settings_are_saved_and_seen_by_the_fingerprint(tmp_path: Path) -> None:
    chosen = {"prompt": "chat", "system": "Say.", "ending": "<|endoftext|>", "keep_stray": True, "resize": "low"}
    encoder = Encoder.from_pretrained("builtin/tiny-qwen2_vl", **chosen)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert {key: getattr(again.options, key) for key in chosen} == chosen
    assert again.fingerprint() == encoder.fingerprint()
    prints = {again.processor.fingerprint}
    for other in (
        {"prompt": "raw", "system": None, "ending": None},
        {"system": "No."},
        {"ending": None},
        {"keep_stray": False},
        {"resize": 96},
    ):
        prints.add(Encoder.from_pretrained(tmp_path, **other).processor.fingerprint)
    assert len(prints) == 6


def test_a_cache_tells_an_instruction_from_a_text() -> None:
    together, apart = Item("Find: a cat\n"), Item("a cat", instruction="Find:")
    assert content_digest(together, []) != content_digest(apart, [])


def test_a_stray_placeholder_is_kept_on_request(tiny: Tiny) -> None:
    item = Item("<|image_1|>\nwho?\n")
    gone, kept = (featurize(tiny("qwen2_vl", keep_stray=keep).processor, item).input_ids for keep in (False, True))
    tokenizer = tiny("qwen2_vl").processor.tokenizer
    assert (tokenizer.decode(gone), tokenizer.decode(kept)) == ("who?\n", "<|image_1|>\nwho?\n")
