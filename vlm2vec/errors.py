"""Every error a user can meet, with the exit code the command line ends with.

Exit codes: 0 finished · 1 unexpected · 2 input · 3 numeric · 4 environment or disk · 5 locked · 130 and 143 interrupted by SIGINT and
SIGTERM. A message names the file, row or key, says what was found and what to do about it.
"""

from __future__ import annotations


class Vlm2VecError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(Vlm2VecError):
    """Something the user handed in cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or an override of one, is wrong."""


class DataError(InputError):
    """A dataset, or one of its rows, is wrong."""


class ImageError(DataError):
    """A picture cannot be read safely."""


class PathError(ImageError):
    """A path would leave the folder it is meant to stay in."""


class ModelError(InputError):
    """A backbone cannot be found, built or read."""


class AdapterError(ModelError):
    """An adapter does not fit its base model, tensor by tensor."""


class ParityError(ModelError):
    """Two tools embed the same item differently, or a folder is not what was exported."""


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged or belongs to another run."""


class ManifestError(CheckpointError):
    """A published folder does not match its manifest."""


class NonFiniteError(Vlm2VecError):
    """A loss, an embedding or a gradient is NaN or infinite; nothing was updated."""

    exit_code = 3


class EnvError(Vlm2VecError):
    """The machine refused: disk full, read-only, no permission."""

    exit_code = 4


class RunLockedError(Vlm2VecError):
    """Another live process holds the run folder."""

    exit_code = 5


class Interrupted(Vlm2VecError):
    """A signal asked the run to stop; the state was saved first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
