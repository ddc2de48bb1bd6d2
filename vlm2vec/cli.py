"""`vlm2vec COMMAND`, those of COMMANDS: arguments in, exit codes out. The work is done elsewhere."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Sequence

from vlm2vec import log
from vlm2vec.commands import compare, data, encode, estimate, eval, export, index, keys, push, search, serve, train, ui, verify
from vlm2vec.errors import Vlm2VecError

EXIT_CODES = """exit codes: 0 finished, 2 wrong input, 3 not-a-number stopped the run, 4 disk or machine refused, 5 run folder in use,
130 or 143 interrupted after saving (run the same command to go on)"""
COMMANDS = {
    "train": (train, "train, evaluate and report from a recipe"),
    "estimate": (estimate, "say what a recipe costs on a GPU that is not at hand"),
    "eval": (eval, "score a model on a benchmark suite"),
    "compare": (compare, "compare evaluations, query by query"),
    "encode": (encode, "embed a corpus: pictures, JSONL or parquet"),
    "export": (export, "write a model for everybody's tools, checked against them"),
    "verify": (verify, "check an exported model, here or on the Hub"),
    "push": (push, "put an exported folder onto the Hugging Face Hub"),
    "index": (index, "make a folder of pictures, JSONL or parquet searchable"),
    "search": (search, "find what is nearest to a text, a picture or both"),
    "ui": (ui, "search an index in the browser, with words or a picture"),
    "serve": (serve, "answer OpenAI's embeddings route, with pictures"),
    "data": (data, "fetch, build, make up or check data"),
    "keys": (keys, "list every key of a recipe with type, default and meaning"),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="vlm2vec", description="Turn any vision-language model into an embedding model.", epilog=EXIT_CODES)
    top.add_argument("--verbose", action="store_true", help="log details, and show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=summary, description=module.HELP, formatter_class=raw, epilog=EXIT_CODES)
        command.set_defaults(run=getattr(module, "run", None))  # a command of several actions has a function for each
        module.arguments(command)
    return top


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of one command; overrides may stand before and after options, which argparse alone does not allow behind a sub-command."""
    whole = parser()
    given, rest = whole.parse_known_args(argv)
    if rest and (given.command not in ("train", "estimate") or any(word.startswith("-") for word in rest)):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        given.overrides += rest
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = parse(argv)
    log.setup("debug" if given.verbose else "info")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")  # for their developers, not for our users
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is raised, and Python keeps every text that it warned with
    logging.getLogger("DeepSpeed").addFilter(_no_alarm)
    try:
        given.run(given)
    except Vlm2VecError as error:
        if given.verbose:
            raise
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:  # where there is no state to save: what takes long has a StopSignal
        if given.verbose:
            raise
        sys.stderr.write("error: interrupted; the same command may be run again\n")
        return 128 + signal.SIGINT
    return 0


def _no_alarm(record: logging.LogRecord) -> bool:
    """That there is no GPU is no news to those who have none, and DeepSpeed, where it is installed, warns of it in every run."""
    return "Setting accelerator to CPU" not in record.getMessage()
