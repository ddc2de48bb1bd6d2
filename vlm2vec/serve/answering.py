"""From embeddings to the bytes of an answer, piece by piece: no answer is ever in memory as a whole. Shape letters: N items, D numbers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 16  # bytes


def pieces(rows_ND: NDArray[np.float32], model: str, tokens: int, as_base64: bool) -> Iterator[bytes]:
    """JSON as OpenAI answers. A number is written with all digits of its float32; base64 is of little-endian float32."""
    held = bytearray(b'{"object": "list", "data": [')
    for index, row_D in enumerate(rows_ND):
        embedding = base64.b64encode(row_D.astype("<f4").tobytes()).decode("ascii") if as_base64 else row_D.tolist()
        held += b", " if index else b""
        held += json.dumps({"object": "embedding", "index": index, "embedding": embedding}, allow_nan=False).encode("ascii")
        if len(held) >= PIECE:
            yield bytes(held)
            held.clear()
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    yield bytes(held) + f'], "model": {json.dumps(model)}, "usage": {json.dumps(usage)}}}'.encode("ascii")
