"""How much memory is there: on a GPU what its allocator can still hand out, else what the machine, or the container around it, has left."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

CONTAINER = Path("/sys/fs/cgroup")  # version 2: a container sees its own limit there
LIMIT, USED = "memory.max", "memory.current"


def available(device: torch.device) -> int:
    """Bytes that this process may still take. Processes of one machine share its memory alike; each GPU belongs to one process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, left_in_container()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def left_in_container(folder: Path = CONTAINER) -> int:
    """Bytes below the limit of a container; without a limit more than any machine has."""
    limit, used = ((folder / name).read_text("ascii").strip() if (folder / name).is_file() else "max" for name in (LIMIT, USED))
    return int(limit) - int(used) if limit.isdigit() and used.isdigit() else 1 << 62

