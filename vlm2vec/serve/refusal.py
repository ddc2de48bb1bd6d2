"""The one kind of error that a client sees, in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping

KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
PATIENCE = {"retry-after": "1"}  # seconds; a full house empties at the pace of the model


class Refusal(Exception):
    """An answer that is no embedding: HTTP `status`, what was wrong and what to do, the key `param` that it is about."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    def body(self) -> bytes:
        """JSON in ASCII: what a client sent may be quoted in it, lone surrogates included."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")
