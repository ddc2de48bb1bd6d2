"""What launchers promise in the environment, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from tests.conftest import ended
from tests.conftest import start as fork
from tests.runs import tiny_recipe
from vlm2vec import dist
from vlm2vec.engines.launch import check_processes, implied_engine, settled, start
from vlm2vec.errors import EnvError, RecipeError

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "accelerate").glob("*.yaml"))
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def environment(command: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` itself gives the processes of a command."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    words = shlex.split(command)
    assert words[:2] == ["accelerate", "launch"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    if arguments.use_deepspeed and not arguments.cpu:
        arguments.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(arguments)[1]
    if (arguments.use_fsdp or arguments.multi_gpu) and not arguments.cpu:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def test_there_are_configs() -> None:
    assert [path.stem for path in CONFIGS] == ["1_gpu", "2_cpu", "2_nodes", "8_gpu_ddp", "8_gpu_fsdp2", "8_gpu_zero3"]


@each_config
def test_configs_are_accelerates_and_say_what_they_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    words = path.stem.split("_")
    assert config.num_machines == (2 if "nodes" in words else 1)
    assert config.num_processes == (16 if "nodes" in words else int(words[0]))
    text = path.read_text("utf-8")
    assert re.match(r"# What: +\S(.|\n)*\n# When: +\S(.|\n)*\n# Launch: +accelerate launch ", text)
    launch = re.search(r"# Launch: +(.*)", text)
    assert launch is not None and str(path.relative_to(Path(__file__).parents[1])) in launch[1]
    found = implied_engine(environment(launch[1].replace("ADDRESS", "10.0.0.1"), monkeypatch))
    assert found == {"8_gpu_fsdp2": "fsdp2", "8_gpu_zero3": "zero3"}.get(path.stem)


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ("--use_fsdp --fsdp_version 2", "fsdp2"),
        ("--use_deepspeed --zero_stage 1", "zero1"),
        ("--use_deepspeed", "zero2"),
        ("--use_deepspeed --zero_stage 3", "zero3"),
        ("--use_deepspeed --zero_stage 0", "ddp"),
        ("--multi_gpu", None),
    ],
)
def test_flags_of_accelerate_imply_an_engine(flags: str, engine: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert implied_engine(environment(f"accelerate launch {flags} --num_processes 2 train.py", monkeypatch)) == engine


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offload"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "'4'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none.json"}, "none.json"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
    ],
)
def test_what_no_engine_does_is_refused(found: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        implied_engine(found)


def test_the_stage_stands_in_deepspeeds_own_file(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert implied_engine({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == "zero3"


def test_recipe_and_launcher_settle_on_one_engine() -> None:
    assert [settled(None, None), settled("zero1", None), settled(None, "fsdp2"), settled("zero3", "zero3")] == [
        "ddp",
        "zero1",
        "fsdp2",
        "zero3",
    ]
    for implied in ("fsdp2", "zero2"):
        with pytest.raises(RecipeError, match=f"ddp but the accelerate config asks for {implied}"):
            settled("ddp", implied)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_do_not_know_of_each_other_are_refused(name: str) -> None:
    with pytest.raises(EnvError, match=f"{name}=2.*alone(.|\n)*accelerate launch(.|\n)*torchrun"):
        check_processes({name: "2"}, found=1)
    check_processes({name: "2"}, found=2)
    check_processes({name: "1"}, found=1)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_accelerate_starting_one_process_where_two_were_asked_for_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    text = (CONFIGS[0].parent / "2_cpu.yaml").read_text("utf-8")
    file.write_text(text.replace("distributed_type: MULTI_GPU", f"distributed_type: '{kind}'"))
    for command in ("--cpu --num_processes 2", f"--config_file {file}"):
        with pytest.raises(EnvError, match="2_cpu.yaml"):
            check_processes(environment(f"accelerate launch {command} train.py", monkeypatch), found=1)
    check_processes(environment("accelerate launch --cpu --num_processes 1 train.py", monkeypatch), found=1)


@pytest.mark.parametrize(("minutes", "code"), [(0.02, 7), (1.0, 0)])
def test_a_process_waits_for_another_as_long_as_the_recipe_says(minutes: float, code: int, tmp_path: Path) -> None:
    """The second process is busy for two seconds and a half while the first waits for it: longer than one, shorter than sixty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = replace(tiny_recipe(tmp_path), run=replace(tiny_recipe(tmp_path).run, timeout=minutes))

    def member(rank: int) -> None:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()}, GLOO_SOCKET_IFNAME="lo", ACCELERATE_USE_CPU="true")
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # a run in the process that forked this one had no ranks
        start(recipe)
        time.sleep(2.5 * rank)
        try:
            dist.barrier()
        except RuntimeError as error:
            os._exit(7 if "Timed out" in str(error) else 1)

    first, second = (fork(member, rank) for rank in range(2))
    assert ended(first) == code
    assert ended(second) == 0 or code  # alone, it may end in any way
