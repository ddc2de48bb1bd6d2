"""The files that make a folder a sentence-transformers model.

Where transformers' own classes give our embeddings these are that library's own modules: transformer, pooling, normalisation. Elsewhere it
is one module of ours, which it imports only when its user says so (`trust_remote_code=True`) and only where vlm2vec is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec.backends import ST_MODULE
from vlm2vec.encoder import Encoder
from vlm2vec.io import write_json

OWN = "sentence_transformers."
TRANSFORMER = f"{OWN}base.modules.transformer.Transformer"
POOLING = f"{OWN}sentence_transformer.modules.pooling.Pooling"
NORMALIZE = f"{OWN}base.modules.normalize.Normalize"
POOLED = {"last": "lasttoken", "mean": "mean"}


def write_st_layout(encoder: Encoder, folder: Path, ours: bool) -> None:
    """Write `modules.json` and the settings of its modules; `ours` says whose modules they are."""
    prompts = {"query": encoder.query_instruction, "document": encoder.target_instruction}
    settings = {"model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings)
    if ours:
        write_json(folder / "modules.json", _modules(ST_MODULE))
        return
    write_json(folder / "modules.json", _modules(TRANSFORMER, POOLING, NORMALIZE))
    write_json(folder / "sentence_bert_config.json", _transformer(encoder.backbone.guarded_elsewhere))
    pooling = {"embedding_dimension": encoder.backbone.hidden_size, "pooling_mode": POOLED[encoder.options.pooling], "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "2_Normalize" / "config.json", {})  # a folder without a file would get lost on the Hub


def _modules(*types: str) -> list[dict[str, Any]]:
    """The first module lives in the root, the others in folders of their own."""
    return [
        {"idx": place, "name": str(place), "path": f"{place}_{kind.rpartition('.')[2]}" if place else "", "type": kind}
        for place, kind in enumerate(types)
    ]


def _transformer(guarded: bool) -> dict[str, Any]:
    """Every input becomes a message, for the chat template holds our prompt rules. Rows are padded: not every family can do without."""
    states = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": states, "image": states, "message": {**states, "format": "structured"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": False,
    }
    return settings | ({"processing_kwargs": {"chat_template": {"sanitize_control_tokens": True}}} if guarded else {})
