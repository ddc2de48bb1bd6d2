"""How this process was started: the engine that the launcher asks for, and launches that would train something else than they say.

Accelerate and torchrun start processes and describe them in environment variables. Several of their forms start one process where two were
asked for, or several that do not know of each other; each would train to the end, and be wrong. They are refused here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from vlm2vec import dist
from vlm2vec.config import Recipe
from vlm2vec.errors import EnvError, RecipeError

PROMISES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RIGHT = "accelerate launch --config_file recipes/accelerate/{} train.py RECIPE"
ON_CPU = RIGHT.format("2_cpu.yaml")
ON_GPUS = RIGHT.format("8_gpu_ddp.yaml")

Environment = Mapping[str, str]


def start(recipe: Recipe) -> Recipe:
    """Start the process group that the launcher asked for, and settle the engine: the recipe with `train.engine` given.

    From here on `dist` knows the ranks. Raises RecipeError where recipe and launcher contradict each other, EnvError where the launch would
    leave processes unsynchronised or alone.
    """
    engine = settled(recipe.train.engine, implied_engine(os.environ))
    recipe = replace(recipe, train=replace(recipe.train, engine=engine))  # type: ignore[arg-type]  # one of the names that a recipe may give
    recipe.validate()
    # Accelerate starts processes and finds devices; the engines are driven here.
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "false"}
    on_cpu = not torch.cuda.is_available() or _on("ACCELERATE_USE_CPU", os.environ)
    if not torch.distributed.is_initialized():
        PartialState(cpu=on_cpu, timeout=timedelta(minutes=recipe.run.timeout))
    check_processes(os.environ, dist.world_size())
    return recipe


def implied_engine(environment: Environment) -> str | None:
    """The engine that accelerate's config asks for; None if it asks for none. Raises RecipeError for what no engine here does."""
    if _on("ACCELERATE_USE_MEGATRON_LM", environment):
        raise RecipeError("accelerate config: Megatron-LM is not supported; use FSDP (fsdp_version: 2) or DeepSpeed")
    if _on("ACCELERATE_USE_FSDP", environment):
        return _fsdp(environment)
    return _zero(environment) if _on("ACCELERATE_USE_DEEPSPEED", environment) else None


def _fsdp(environment: Environment) -> str:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise RecipeError("accelerate config: FSDP version 1 is not supported; write fsdp_version: 2 under fsdp_config")
    if _on("FSDP_OFFLOAD_PARAMS", environment):
        raise RecipeError("accelerate config: fsdp_offload_params is not supported; write false")
    return "fsdp2"


def _zero(environment: Environment) -> str:
    for key in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        if environment.get(f"ACCELERATE_DEEPSPEED_{key}", "none") not in ("none", ""):
            raise RecipeError(f"accelerate config: {key.lower()} is not supported; write none")
    stage = _stage(environment)
    if stage not in ("0", "1", "2", "3"):
        raise RecipeError(f"accelerate config: zero_stage is {stage!r}; it must be 0, 1, 2 or 3")
    return "ddp" if stage == "0" else f"zero{stage}"


def _stage(environment: Environment) -> str:
    """ZeRO's stage from accelerate's own key, or from the DeepSpeed file it points to."""
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file in ("none", ""):
        return environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    try:
        return str(json.loads(Path(file).read_text("utf-8"))["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file}: DeepSpeed config without a readable zero_optimization.stage ({error})") from error


def settled(asked: str | None, implied: str | None) -> str:
    """The one engine that recipe and launcher agree on. Raises RecipeError where they do not."""
    if asked and implied and asked != implied:
        raise RecipeError(f"train.engine is {asked} but the accelerate config asks for {implied}; take one of them out")
    return asked or implied or "ddp"


def check_processes(environment: Environment, found: int) -> None:
    """Raise EnvError unless this process is one of as many as the launcher started or was asked for."""
    for name in PROMISES:
        promised = environment.get(name, "1")
        if promised.isdigit() and int(promised) > found:
            raise EnvError(
                f"{name}={promised}, but this process knows {found}: each would train alone. Start with\n  {ON_CPU}\n  {ON_GPUS}\n"
                "or torchrun --nproc_per_node N train.py RECIPE"
            )
    if found == 1 and "MASTER_ADDR" in environment and "RANK" not in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        raise EnvError(
            "accelerate was asked for several processes and started one, as it does with --cpu --num_processes N or distributed_type: "
            f"MULTI_CPU. Start with\n  {ON_CPU}\nor torchrun --nproc_per_node N train.py RECIPE; if one process is meant, unset MASTER_ADDR"
        )


def _on(name: str, environment: Environment) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")
