"""One folder that is ours, a Hugging Face model and a sentence-transformers model at once, checked before anybody sees it.

    RUN -> encoder (float32) -> merge, cast -> weights, configuration, the base's own processor files, our prompt rules as a chat template,
    sentence-transformers' modules, README -> parity gate -> published by one rename
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vlm2vec import io, log
from vlm2vec.backbones import resolve
from vlm2vec.backbones.weights import stored_dtype
from vlm2vec.backends import Seen, seen_by
from vlm2vec.config import ModelConfig
from vlm2vec.encoder import SETTINGS, Encoder
from vlm2vec.errors import InputError
from vlm2vec.export.adapter import VLLM, check_adapter, is_local, open_adapter
from vlm2vec.export.card import card
from vlm2vec.export.elsewhere import differences, notes
from vlm2vec.export.merge import cast, check_finite, merge
from vlm2vec.export.processor_files import TEMPLATES, copy_processor_files
from vlm2vec.export.record import Record, record_of
from vlm2vec.export.st_layout import write_st_layout
from vlm2vec.export.template import chat_template
from vlm2vec.probe_file import PROBES, write_probes
from vlm2vec.verify import CARD, Report, compare

Form = Literal["merged", "adapter"]
MODEL = "model"  # of a run folder
FORMAT = 1  # of the folder: raise it whenever an equal model would be written otherwise
logger = log.get_logger(__name__)


def export(
    source: str,
    to: str | Path,
    form: Form = "merged",
    dtype: str | None = None,
    *,
    revision: str | None = None,
    results: str | Path | None = None,
    overwrite: bool = False,
    check: bool = True,
    device: str = "cpu",
) -> Report | None:
    """Write the model of `source`, a run folder or what `Encoder.from_pretrained` takes, into the folder `to`.

    `dtype` is that of whole weights, by default what the base has on disk. `results` is a file of scores that travels with the model, by
    default the one of the run. `check` runs the parity gate on the folder before it is published. Returns the gate's report, without rows
    where it did not run; None where the same export is there already. Raises InputError if `to` holds something else, AdapterError for an
    adapter that other tools could not read, NonFiniteError for weights that are no numbers, ParityError if tools disagree, EnvError if the
    disk refuses.
    """
    to = Path(to)
    encoder = Encoder.from_pretrained(model_of(source), revision=revision, device=device, dtype="float32")
    if form == "adapter":
        check_adapter(encoder)
    base = resolve(ModelConfig(path=encoder.options.path, revision=encoder.options.revision))
    record = record_of(source, results)
    about = _about(encoder, form, "float32" if form == "adapter" else dtype or stored_dtype(base), record)
    if not _free(to, about["identity"], overwrite):
        return None
    report, before = Report(to, "float32"), seen_by(encoder) if check else None
    with io.publishing(to) as staging:
        _write(encoder, base, staging, about)
        record.write(staging)
        io.write_atomic(staging / CARD, card(to.name, io.read_json(staging / SETTINGS)))
        del encoder  # the tools that follow need its memory
        if check:
            _gate(staging, report, device, before, about["dtype"])
    for remark in [*about["differences"], *about["notes"]]:
        logger.info("%s: %s", to, remark)
    return report


def model_of(source: str) -> str:
    """The model that a run folder holds, or `source` itself. Raises InputError for a run that has not finished."""
    folder = Path(source).expanduser()
    if (folder / MODEL).is_dir():
        return str(folder / MODEL)
    if unfinished := sorted(folder.glob("step-*")):
        raise InputError(f"{folder}: the run has not finished; go on with it, or export its newest checkpoint {unfinished[-1]}")
    return source


def _about(encoder: Encoder, form: Form, dtype: str, record: Record) -> dict[str, Any]:
    """What `vlm2vec.json` says of the export. Equal identities mean equal folders."""
    about = {
        "form": form,
        "dtype": dtype,
        "base": None if is_local(encoder.options.path) else encoder.options.path,
        "differences": differences(encoder),
        "notes": _notes(encoder, form),
        "guarded": encoder.backbone.guarded_elsewhere,
    }
    texts = [encoder.query_instruction, encoder.target_instruction, encoder.options.path, record.recipe, record.results]
    return {**about, "identity": io.digest([encoder.fingerprint(), about, texts, FORMAT])}


def _free(to: Path, identity: str, overwrite: bool) -> bool:
    """Whether to write; not if the same export is there, whole. Raises InputError where something else is."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return True
    found = io.read_json(to / SETTINGS).get("export") if (to / SETTINGS).is_file() and (to / io.MANIFEST).is_file() else None
    if not found:
        raise InputError(f"{to} holds something that is no export; choose a new or an empty folder")
    if overwrite:
        return True
    if found["identity"] != identity:
        raise InputError(f"{to} holds another export; choose another folder, or replace it with --overwrite")
    io.verify_manifest(to)
    return False


def _write(encoder: Encoder, base: Path, folder: Path, about: dict[str, Any]) -> None:
    """Everything but the README and what the gate keeps."""
    if about["form"] == "merged":
        merge(encoder)
        cast(encoder, about["dtype"])
    else:
        check_finite(encoder.model.state_dict(), about["dtype"])
    encoder.save_pretrained(folder, export=about)
    copy_processor_files(encoder.processor, base, folder)
    if about["form"] == "adapter":
        open_adapter(folder, base, is_local(encoder.options.path))
    if not about["differences"]:
        for name in TEMPLATES:
            (folder / name).unlink(missing_ok=True)
        io.write_atomic(folder / TEMPLATES[0], chat_template(encoder.processor))
    write_st_layout(encoder, folder, ours=bool(about["differences"]))


def _notes(encoder: Encoder, form: Form) -> list[str]:
    """What a user of the folder must know, for its README."""
    if form == "merged":
        return notes(encoder)
    said = [*notes(encoder), VLLM]
    if is_local(encoder.options.path):
        base = encoder.options.path
        lost = f"The base {base} lies on this machine only, so nobody else can load this adapter; export with --merged to share it."
        logger.warning(lost)
        said.insert(0, lost)
    return said


def _gate(folder: Path, report: Report, device: str, before: Seen | None, rounded: str) -> None:
    """Hold the folder against what it was made from and the tools against each other, and keep what our own code sees."""
    seen = compare(folder, report, device, before, rounded)
    report.require()
    write_probes(seen, folder / PROBES)
