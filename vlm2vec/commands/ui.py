"""`vlm2vec ui`: a page in the browser to search an index with words or a picture."""

from __future__ import annotations

import argparse
import contextlib
import webbrowser

from vlm2vec.address import bound, listen, url
from vlm2vec.commands import positive, say
from vlm2vec.errors import InputError

HELP = """Search an index in the browser: type words, drop a picture, click a result to go on from it.

  vlm2vec ui pictures.index --open
  vlm2vec ui pictures.index --port 8000 --top 50
  vlm2vec ui pictures.index --host 0.0.0.0      for everybody who reaches this machine, without a password

Ctrl-C ends it. It needs pip install 'vlm2vec[ui]'."""


def arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    command.add_argument("index", help="a folder that vlm2vec index made")
    command.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine alone)")
    command.add_argument("--port", type=int, default=7860, help="port to serve at; 0 takes a free one (default: 7860)")
    command.add_argument("--top", type=positive, default=20, help="how many results, until the page asks for more (default: 20)")
    command.add_argument("--approximate", action="store_true", help="look into the lists of vlm2vec index --approximate")
    command.add_argument("--model", help="where the model of the index lies now, if it has moved")
    command.add_argument("--device", help="cpu, cuda or cuda:<n> (default: a GPU if there is one)")
    command.add_argument("--open", action="store_true", help="open the page in the browser")


def run(given: argparse.Namespace) -> None:
    """Serve until it is interrupted."""
    _check_extra()
    import uvicorn

    from vlm2vec.commands.loading import chosen_device
    from vlm2vec.index import Index
    from vlm2vec.ui.app import app
    from vlm2vec.ui.search import MOST, Searcher

    if given.top > MOST:
        raise InputError(f"--top: expected 1 to {MOST}, got {given.top:,}")
    index = Index.open(given.index)
    with bound(given.host, given.port) as sock:
        listen(sock)
        searcher = Searcher(index, index.load_encoder(given.model, chosen_device(given)), given.top, given.approximate)
        address = url(given.host, sock.getsockname()[1])
        say(f"{len(index):,} items at {address}   (Ctrl-C ends it)")
        if given.open:
            webbrowser.open(address)  # connections wait in the socket until they are answered
        config = uvicorn.Config(app(searcher, given.host), log_level="warning", server_header=False, limit_concurrency=100)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[sock])


def _check_extra() -> None:
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"vlm2vec ui needs {error.name}: pip install 'vlm2vec[ui]'") from None
