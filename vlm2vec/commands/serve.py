"""`vlm2vec serve`: a model behind OpenAI's embeddings route."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

from vlm2vec.address import bound, url
from vlm2vec.commands import positive, say
from vlm2vec.commands.loading import compute_arguments, load_encoder, model_arguments
from vlm2vec.errors import EnvError, InputError
from vlm2vec.serve.limits import Limits
from vlm2vec.signals import StopSignal

KEY = "VLM2VEC_API_KEY"
HELP = f"""Answer OpenAI's embeddings route, extended by pictures.

  vlm2vec serve runs/quickstart/model
  vlm2vec serve owner/name --host 0.0.0.0 --port 8080 --name my-embedder
  curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{{"input": ["a red car"]}}'

GET /health, /v1/models and /metrics (Prometheus) stand beside it. With {KEY} in the environment /v1 wants that key. It needs
pip install 'vlm2vec[serve]'. docs/serve.md has clients, limits, what to put in front, and what to use at scale."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    model_arguments(command)
    command.add_argument("--name", help="what clients call the model (default: the id, or the name of the folder)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    command.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000; 0 for any that is free)")
    command.add_argument("--threads", type=positive, default=2, help="threads that decode and tokenize (default: 2)")
    compute_arguments(command)
    for limit in fields(Limits):
        meaning = f"{limit.metadata['meaning']} (default: {limit.default:,})"
        command.add_argument(f"--max-{limit.name.replace('_', '-')}", type=positive, default=limit.default, metavar="N", help=meaning)


def run(given: argparse.Namespace) -> None:
    """Load, serve until a signal, end with the exit code of the signal."""
    try:
        from vlm2vec.serve.app import Server
        from vlm2vec.serve.server import serve
    except ImportError as error:
        raise EnvError(f"vlm2vec serve needs starlette and uvicorn ({error}): pip install 'vlm2vec[serve]'") from None
    from vlm2vec.serve.asking import Served
    from vlm2vec.serve.batcher import Batcher
    from vlm2vec.serve.counts import Counts

    limits, counts, key = _limits(given), Counts(), _key()
    name = given.name or (Path(given.model).resolve().name if Path(given.model).exists() else given.model)
    with StopSignal() as stop:
        sock = bound(given.host, given.port)  # before the model, which may take long
        with stop.cutting("stopped while the model was loaded"):
            encoder = load_encoder(given)
            batcher = Batcher(encoder, limits, counts, given.chunk_tokens, given.threads)
            batcher.start()
        served = Served(name, encoder.backbone.hidden_size, encoder.query_instruction, encoder.target_instruction)
        say(f"serving {name} ({served.dims} numbers) on {url(*sock.getsockname()[:2])}/v1")
        serve(Server(batcher, served, limits, counts, key, given.threads).app(), sock, limits, counts, stop)
        batcher.close()
        raise stop.interrupted("stopped by a signal; what was asked before it was answered")


def _limits(given: argparse.Namespace) -> Limits:
    return Limits(**{limit.name: getattr(given, f"max_{limit.name}") for limit in fields(Limits)})


def _key() -> str:
    """The key that clients must send, or nothing. Raises InputError for one that no header can carry."""
    key = os.environ.get(KEY)
    if key is None:
        return ""
    if not key.isascii() or not key.isprintable() or not key.strip() or key != key.strip():
        raise InputError(f"{KEY} is set but empty, padded with spaces or not plain ASCII; set it to a key, or unset it to ask for none")
    return key
