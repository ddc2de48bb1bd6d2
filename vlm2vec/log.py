"""Log lines and progress bars, quiet on every rank but the main one.

Only the command line calls `setup`; without it Python shows the warnings and hides the rest. tqdm takes half the time of `--help` to
import, so it waits until there is something to show.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from vlm2vec import dist
from vlm2vec.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

PACKAGE = "vlm2vec"
LEVELS = ("debug", "info", "warning", "error")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, below "vlm2vec" whatever `name` is."""
    return logging.getLogger(name if name == PACKAGE or name.startswith(PACKAGE + ".") else f"{PACKAGE}.{name}")


def setup(level: str = "info") -> None:
    """Write the package's log lines to standard error; calling it again only changes the level. Raises InputError on an unknown level."""
    if level.lower() not in LEVELS:
        raise InputError(f"unknown log level {level!r}: one of {', '.join(LEVELS)}")
    logger = logging.getLogger(PACKAGE)
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())
    logger.setLevel(level.upper())


def progress(
    total: int | None, desc: str, unit: str = "it", initial: int = 0, enabled: bool | None = None, leave: bool = True
) -> tqdm[Any]:
    """A progress bar on standard error of the main rank. `enabled` None shows it on a terminal only, True always, False never.

    A bar that does not `leave` vanishes when it is done; a bar opened inside another stands below it.
    """
    from tqdm import tqdm

    shown = (sys.stderr.isatty() if enabled is None else enabled) and dist.is_main()
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not shown, leave=leave, dynamic_ncols=True)


class _Handler(logging.Handler):
    """Writes above a running progress bar; ranks other than the main one write warnings and errors only, with their rank in front."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or dist.is_main()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        rank = "" if dist.is_main() else f"[rank {dist.rank()}] "
        tqdm.write(rank + self.format(record), file=sys.stderr)
