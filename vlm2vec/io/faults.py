"""Where tests inject failures into writing, so that "killed inside a save" is exact and not a matter of luck."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

_hits: Counter[str] = Counter()


def fault(point: str, name: str = "") -> None:
    """Do nothing, unless the environment has VLM2VEC_FAULT="point:count:kind".

    Then every `count`-th call with that point ("*" is any point) fails: `kind` "kill" sends SIGKILL to this process, the name of an error
    number in lower case ("enospc", "eio", "eacces") raises it as OSError about `name`, the file or folder at hand.
    """
    spec = os.environ.get("VLM2VEC_FAULT")
    if not spec:
        return
    wanted, count, kind = spec.split(":")
    if wanted not in ("*", point):
        return
    _hits[spec] += 1
    if _hits[spec] < int(count):
        return
    del _hits[spec]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number = getattr(errno, kind.upper())
    raise OSError(number, os.strerror(number), name or point)
