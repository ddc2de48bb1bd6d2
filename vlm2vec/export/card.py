"""The README of an exported folder: how each tool reads it, and what it cannot read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vlm2vec import plain


def card(name: str, settings: Mapping[str, Any]) -> str:
    """Markdown. `name` is how the snippets call the folder, `settings` what `vlm2vec.json` says."""
    export = settings["export"]
    made = f"an adapter on `{settings['base']['path']}`" if export["form"] == "adapter" else f"whole weights in {export['dtype']}"
    parts = [
        f"# {name}\n\nAn embedding model for texts, pictures and both together: {made}, exported by vlm2vec.",
        *([said] if (said := _instructions(settings)) else []),
        _limits(export["differences"], export["notes"]),
        _code("vlm2vec", ours(name)),
        _code("sentence-transformers", sentence_transformers(name, export)),
    ]
    if not export["differences"]:
        parts.append(_code("transformers", transformers(name, settings)))
    if not export["differences"] and export["form"] == "merged":
        parts.append(_code("vLLM (not tried here)", vllm(name)))
    parts.append(f"`vlm2vec verify {name}` holds a copy of this folder against what it was when made, and the tools against each other.")
    return "\n\n".join(parts) + "\n"


def _instructions(settings: Mapping[str, Any]) -> str:
    said = {"Queries": settings["query_instruction"], "Targets": settings["target_instruction"]}
    return "\n".join(f"{role} are embedded under the instruction `{text}`." for role, text in said.items() if text)


def _limits(differences: list[str], notes: list[str]) -> str:
    lines = [f"- {note}" for note in notes]
    if differences:
        use = "Use vlm2vec, or sentence-transformers with vlm2vec installed; transformers alone gives other numbers, and vLLM was not tried"
        lines.insert(0, f"- {use}: {'; '.join(differences)}.")
    return "## Limits\n\n" + "\n".join(lines)


def _code(title: str, text: str) -> str:
    return f"## {title}\n\n```python\n{text.strip()}\n```"


def ours(name: str) -> str:
    """The snippet for this library."""
    return f"""
from vlm2vec import Encoder

encoder = Encoder.from_pretrained("{name}")
queries = encoder.encode_query(["a red apple"])
targets = encoder.encode_target([{{"image": "apple.jpg"}}, {{"image": "pear.jpg", "text": "a pear"}}])
print(encoder.similarity(queries, targets))
"""


def sentence_transformers(name: str, export: Mapping[str, Any]) -> str:
    """The snippet for sentence-transformers."""
    trust = ", trust_remote_code=True" if export["differences"] else ""
    install = "vlm2vec[st]: its code runs, none of this repository does" if trust else "sentence-transformers[image]"
    return f"""
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{trust})  # pip install {install}
queries = model.encode_query(["a red apple"])
targets = model.encode_document([Image.open("apple.jpg"), {{"image": Image.open("pear.jpg"), "text": "a pear"}}])
print(model.similarity(queries, targets))
"""


def transformers(name: str, settings: Mapping[str, Any]) -> str:
    """The snippet for transformers alone. It is the code that the parity gate runs."""
    pool = plain.POOLS[settings["model"]["pooling"]]
    guard = ", sanitize_control_tokens=True" if settings["export"]["guarded"] else ""
    functions = "\n\n".join(inspect.getsource(function) for function in (plain.token_states, pool))
    return f"""
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor


{functions}

model, processor = AutoModel.from_pretrained("{name}").eval(), AutoProcessor.from_pretrained("{name}")
conversations = [  # an instruction would be a system message in front
    [{{"role": "user", "content": [{{"type": "text", "text": "a red apple"}}]}}],
    [{{"role": "user", "content": [{{"type": "image", "image": Image.open("apple.jpg")}}, {{"type": "text", "text": "an apple"}}]}}],
]
batch = processor.apply_chat_template(
    conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={{"padding": True}}{guard}
)
embeddings = {pool.__name__}(*token_states(model, batch))
print(embeddings @ embeddings.T)
"""


def vllm(name: str) -> str:
    """The snippet for vLLM, which was never run here."""
    return f"""
from PIL import Image
from transformers import AutoTokenizer
from vllm import LLM

tokenizer = AutoTokenizer.from_pretrained("{name}")
content = [{{"type": "image"}}, {{"type": "text", "text": "an apple"}}]
text = tokenizer.apply_chat_template([{{"role": "user", "content": content}}], tokenize=False)
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
item = {{"prompt_token_ids": ids, "multi_modal_data": {{"image": Image.open("apple.jpg")}}}}
outputs = LLM(model="{name}", runner="pooling").embed([item])
print(outputs[0].outputs.embedding)
"""
