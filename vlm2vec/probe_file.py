"""`probe_embeddings.safetensors`: what our own code saw of an export when it was made, so that a later user can hold a copy against it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlm2vec import samples
from vlm2vec.backbones.weights import check_safetensors
from vlm2vec.backends import Fed, Seen
from vlm2vec.errors import InputError

PROBES = "probe_embeddings.safetensors"


def write_probes(seen: Seen, file: Path) -> None:
    """Embeddings (N, D) by group, and token ids and pixels by item, whose ids are in the metadata."""
    ids = [name for group in samples.groups() for name in group.ids]
    tensors = {f"embeddings/{name}": rows_ND.contiguous() for name, rows_ND in seen.embeddings.items()}
    tensors |= {f"tokens/{name}": torch.tensor(seen.fed[name].tokens) for name in ids}
    tensors["pixels"] = torch.tensor([seen.fed[name].pixels for name in ids], dtype=torch.float64)
    save_file(tensors, file, metadata={"ids": json.dumps(ids), "samples": str(samples.VERSION)})


def read_probes(file: Path) -> Seen:
    """What `write_probes` kept. Raises ModelError for a damaged file and InputError for one with other samples than ours."""
    check_safetensors(file)
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata() or {}
        if about.get("samples") != str(samples.VERSION):
            found = about.get("samples")
            raise InputError(f"{file}: holds samples of version {found}, this version of vlm2vec has {samples.VERSION}; export again")
        ids, pixels = json.loads(about["ids"]), stored.get_tensor("pixels").tolist()
        fed = {name: Fed(tuple(stored.get_tensor(f"tokens/{name}").tolist()), tuple(pair)) for name, pair in zip(ids, pixels, strict=True)}
        return Seen({group.name: stored.get_tensor(f"embeddings/{group.name}") for group in samples.groups()}, fed)
