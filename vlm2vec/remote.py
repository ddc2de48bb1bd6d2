"""Requests to the Hub: which failures pass, how long to wait, and what to tell the user. Tokens and signed addresses are never told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_token

from vlm2vec.errors import DataError, EnvError, Vlm2VecError
from vlm2vec.log import get_logger

WAITS = (1, 2, 4, 8, 16)  # seconds before each new attempt that follows one without progress
LONGEST_WAIT = 300  # seconds, whatever a server asks for
TIMEOUT = 60  # seconds without a byte
TRANSIENT = (408, 429, 500, 502, 503, 504)
FAILURES = (HTTPError, OfflineModeIsEnabled, HFValidationError)

_logger = get_logger(__name__)


class Patience:
    """Waits between attempts, longer each time there was no progress, and gives up with an error in words."""

    def __init__(self, what: str, to: str = "read") -> None:
        self._what, self._to, self._tries = what, to, 0

    def wait(self, error: Exception, progressed: bool = False) -> None:
        """Sleep, or raise what `error` means for the user when another attempt is no use."""
        self._tries = 1 if progressed else self._tries + 1
        if not transient(error) or self._tries > len(WAITS):
            raise explained(error, self._what, self._to) from None  # the cause holds request headers
        pause = min(max(WAITS[self._tries - 1], _asked_for(error)), LONGEST_WAIT)
        _logger.warning("%s: %s; trying again in %d s", self._what, words(error), pause)
        time.sleep(pause)


T = TypeVar("T")


def patiently(what: str, call: Callable[[], T], to: str = "read", wrappers: tuple[type[Exception], ...] = ()) -> T:
    """What `call` returns, tried again while its failures pass. Raises what the last one means for the user.

    `wrappers` are errors in which the client may wrap a failure; they are failures by themselves too.
    """
    patience = Patience(what, to)
    while True:
        try:
            return call()
        except FAILURES as error:
            patience.wait(error)
        except wrappers as error:
            patience.wait(error.__cause__ if isinstance(error.__cause__, FAILURES) else error)


def _status(error: Exception) -> int:
    """The HTTP status behind an error, 0 if there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0


def transient(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled | HFValidationError):
        return False
    return not _status(error) or _status(error) in TRANSIENT


def _asked_for(error: Exception) -> int:
    """Seconds that the server asks to wait."""
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) and error.response is not None else ""
    return int(value) if value.strip().isdigit() else 0


def words(error: Exception) -> str:
    """What the server said, or the client if no server did, on one line, without the token and without signed addresses."""
    status = f"{_status(error)} " if _status(error) else ""
    text = getattr(error, "server_message", None) or str(error).partition("\n")[0] or type(error).__name__
    token = get_token()
    hidden = text.replace(token, "<token>") if token else text
    return status + " ".join(word.partition("?")[0] if "://" in word else word for word in hidden.split())[:300]


def explained(error: Exception, what: str, to: str = "read") -> Vlm2VecError:
    """The error that a user should see; `to` is what was to be done with `what`: read or write it."""
    said, status = words(error), _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return DataError(f"{what} is not here and the Hub may not be asked (HF_HUB_OFFLINE is set); unset it once to {to} it")
    if isinstance(error, HFValidationError):
        return DataError(f"{what}: {said}")
    if isinstance(error, GatedRepoError) or status == 403:
        terms = "accept its terms on the Hub and " if to == "read" else ""
        return DataError(f"{what}: access refused ({said}); {terms}set HF_TOKEN to a token that may {to} it")
    if status == 401:
        return DataError(f"{what}: not found or private ({said}); check the name, and set HF_TOKEN to a token that may {to} it")
    if status == 404:
        return DataError(f"{what}: not found ({said}); check the name and the revision")
    if status and status not in TRANSIENT:
        return DataError(f"{what}: refused ({said})")
    reason = "the server failed" if status else "no connection"
    return EnvError(f"{what}: {reason} ({said}); run the same command again later: it goes on where it stopped")
