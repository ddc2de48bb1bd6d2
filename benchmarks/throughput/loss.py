"""The loss, forward and backward, at sizes up to 65,536 queries x 65,536 targets: python -m benchmarks.throughput.loss [--quick].

Every size runs in a process of its own. The floor is four products of 2 N M D operations (scores, scores again, gradients of queries and of
targets) at the best rate that products of a tile's size reach in the same process, before or after; one tile alone keeps its scores and
needs three. Times are of the processor, so that neighbours on the machine weigh less; the clock is given beside them. Memory is the highest
resident size less that with the inputs in place, and less their gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MEBIBYTE = 2**20
HEADER = f"{'queries x targets x D':<36}{'clock':>10}{'cpu':>10}{'floor':>10}{'of it':>11}{'memory':>10}{'plain/ours':>12}{'memory':>12}"
PLAIN_LIMIT = 4096 * 4096  # scores: the full matrix and what autograd keeps of it still fit beside other work


@dataclass(frozen=True)
class Size:
    """Queries, targets (the first of them the queries' own), width of the embedding, and whether the loss has both directions."""

    queries: int
    targets: int
    width: int
    symmetric: bool = False

    def __str__(self) -> str:
        return f"{self.queries:,} x {self.targets:,} x {self.width:,}{' both ways' * self.symmetric}"


QUICK = [Size(64, 64, 1024), Size(1024, 1024, 1024), Size(1024, 2048, 384), Size(2048, 2048, 256, True)]
SIZES = [
    *(Size(64, 64, 384), Size(256, 256, 1024), Size(1024, 1024, 384), Size(1024, 1024, 1024), Size(1024, 8192, 1024)),
    *(Size(4096, 4096, 1024), Size(4096, 4096, 1024, True), Size(4096, 4096, 3072), Size(16384, 16384, 256)),
]
LARGEST = Size(65536, 65536, 1024)


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only: seconds")
    parser.add_argument("--largest", action="store_true", help=f"{LARGEST} only: 35 TFLOP")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(Size(**given.child))))
        return
    print(HEADER)
    for size in QUICK if given.quick else [LARGEST] if given.largest else [*SIZES, LARGEST]:
        print(line(size, in_child(size)), flush=True)


def in_child(size: Size) -> dict[str, float]:
    """What `measure` finds in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.throughput.loss", "--child", json.dumps(asdict(size))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{size} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(size: Size, found: dict[str, float]) -> str:
    """One row of the table."""
    floor = 8 * size.queries * size.targets * size.width / found["rate"]
    plain = f"{found['plain_cpu'] / found['cpu']:>11.2f}x{found['plain_memory'] / MEBIBYTE:>9,.0f} MB" if "plain_cpu" in found else ""
    times = "".join(f"{seconds:>8.4g} s" for seconds in (found["clock"], found["cpu"], floor))
    return f"{size!s:<36}{times}{found['cpu'] / floor:>10.2f}x{found['memory'] / MEBIBYTE:>7,.0f} MB{plain}"


def measure(size: Size) -> dict[str, float]:
    """Seconds of a forward and a backward pass, bytes beyond inputs and gradients, and operations per second of matrix products; also
    seconds and bytes of the loss over the full matrix if it fits.
    """
    import torch
    from torch.nn import functional

    from vlm2vec.config import LossConfig
    from vlm2vec.losses import InfoNCE, info_nce

    query_BD, target_ND = unit_rows(size.queries, size.width), unit_rows(size.targets, size.width)
    row_B, row_N = torch.arange(size.queries), torch.arange(size.targets)
    loss = InfoNCE(LossConfig(symmetric=size.symmetric))

    def tiled() -> Any:
        return loss(query_BD, target_ND, row_B, row_N)[0]

    def plain() -> Any:
        score_BN = query_BD @ target_ND.T / loss.options.temperature
        found = functional.cross_entropy(score_BN, row_B)
        return (found + functional.cross_entropy(score_BN[:, : size.queries].T, row_B)) / 2 if size.symmetric else found

    few = slice(0, 16)
    loss(query_BD[few], target_ND[few], row_B[few], row_N[few])[0].backward()  # what is loaded on first use
    scores = size.queries * size.targets
    repeats = max(1, min(50, 2**22 // scores))
    side = min(math.isqrt(info_nce.SCORES), size.queries)
    rates = [products_per_second(side, size.width)]
    clock, cpu, memory = spent(tiled, (query_BD, target_ND), repeats)
    rates.append(products_per_second(side, size.width))
    found = {"clock": clock, "cpu": cpu, "memory": memory, "rate": max(rates)}
    if scores <= PLAIN_LIMIT:
        _, found["plain_cpu"], found["plain_memory"] = spent(plain, (query_BD, target_ND), repeats)
    return found


def unit_rows(count: int, width: int) -> Any:
    """Random rows of length 1, made in place."""
    import torch

    row_KD = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    return row_KD.div_(torch.linalg.vector_norm(row_KD, dim=1, keepdim=True)).requires_grad_()


def spent(function: Callable[[], Any], inputs: tuple[Any, ...], repeats: int) -> tuple[float, float, float]:
    """Clock and processor seconds, the median of each, and bytes at the highest beyond inputs and gradients."""
    clocks, cpus = [], []
    for each in inputs:
        each.grad = None
    gc.collect()
    before = resident("VmRSS")
    for _ in range(repeats):
        for each in inputs:
            each.grad = None
        clock, cpu = time.perf_counter(), time.process_time()
        function().backward()
        clocks.append(time.perf_counter() - clock)
        cpus.append(time.process_time() - cpu)
    memory = resident("VmHWM") - before - sum(each.grad.nbytes for each in inputs)
    return sorted(clocks)[repeats // 2], sorted(cpus)[repeats // 2], memory


def resident(what: str) -> int:
    """Bytes of this process that are (VmRSS) or at most were (VmHWM) in memory."""
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the highest alone
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(row.split()[1]) * 1024 for row in status.read_text().splitlines() if row.startswith(what))


def products_per_second(side: int, width: int) -> float:
    """Operations per processor second of (side, width) times (width, side), the median of some products."""
    import torch

    left, right = torch.randn(side, width), torch.randn(side, width)
    seconds = []
    for _ in range(max(5, min(200, int(2e10 / (side * side * width))))):
        began = time.process_time()
        left @ right.T
        seconds.append(time.process_time() - began)
    return 2 * side * side * width / sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
