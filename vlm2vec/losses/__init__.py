"""Training objectives: pure functions of gathered embeddings and identities; none of them knows a model."""

from __future__ import annotations

from vlm2vec.losses.info_nce import InfoNCE

__all__ = ["InfoNCE"]
