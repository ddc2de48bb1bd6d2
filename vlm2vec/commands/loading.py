"""The arguments that say which model, where and how, and what becomes of them: shared by the commands that encode."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

from vlm2vec.commands import positive
from vlm2vec.errors import InputError

PATIENCE = timedelta(days=7)  # ranks wait for each other as long as one has a shard or a scan more to do


def model_arguments(command: argparse.ArgumentParser, name: str = "model") -> None:
    """Which model: the first positional argument, or the option `name`, and what goes with it."""
    command.add_argument(name, help="a folder, a Hub id or builtin/<name>")
    command.add_argument("--adapter", help="an adapter folder on top of the model")
    command.add_argument("--revision", help="commit or tag of a model on the Hub")


def compute_arguments(command: argparse.ArgumentParser) -> None:
    """Where and in which precision the model runs."""
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="number format of the weights (default: the model's)")
    command.add_argument("--autocast", choices=["fp32", "bf16"], default="fp32", help="number format of the forward pass (default: fp32)")
    command.add_argument("--device", help="cpu, cuda or cuda:<n> (default: a GPU if there is one)")
    command.add_argument("--option", nargs="+", default=[], metavar="KEY=VALUE", help="keys of a recipe's model section, as positions=flat")
    command.add_argument("--chunk-tokens", type=positive, default=32768, help="tokens of one forward, padding included (default: 32768)")


def device_arguments(command: argparse.ArgumentParser) -> None:
    """Where and how a corpus is encoded."""
    compute_arguments(command)
    command.add_argument("--workers", type=int, default=0, help="processes that decode pictures ahead (default: 0)")


def start_ranks(given: argparse.Namespace) -> None:
    """Start the process group that a launcher asked for: from here on `dist` knows the ranks."""
    from accelerate import PartialState

    PartialState(cpu=given.device == "cpu", timeout=PATIENCE)


def chosen_options(given: argparse.Namespace) -> dict[str, Any]:
    """Keys of a recipe's model section that the arguments set."""
    from vlm2vec.config import model_options

    return model_options(given.option) | ({"dtype": given.dtype} if given.dtype else {})


def chosen_device(given: argparse.Namespace) -> Any:
    """The device that the arguments name, or the best there is. Raises InputError for one that is not there."""
    from accelerate import PartialState

    return _device(given.device) if given.device else PartialState().device


def load_encoder(given: argparse.Namespace) -> Any:
    """The encoder that the arguments name, on its device. Raises InputError for a device that is not there."""
    from vlm2vec.encoder import Encoder

    device, options = chosen_device(given), chosen_options(given)
    encoder = Encoder.from_pretrained(given.model, given.adapter, revision=given.revision, device=device, **options)
    encoder.precision = given.autocast
    return encoder


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine, or this build of torch, has no CUDA device; use --device cpu")
    return device
