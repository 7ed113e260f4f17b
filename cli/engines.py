"""`--launch` by name: the processes that a stage runs in, without a config to be written first."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_whole

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
}
"""What stands in the config beside the processes: whole copies of the base; one that is divided among them
(`models.sharded`); DeepSpeed, which divides the optimiser's state."""


def launch_config(launch: str | None, processes: int | None) -> Path | None:
    """The accelerate config that `--launch` and `--num-processes` mean; None where nothing is launched.

    Raises:
        UserError: a number of processes without an engine, none where no GPU can be counted, or no DeepSpeed.
    """
    if launch == "zero3":
        raise UserError("--launch", ZERO3, INSTEAD_OF_ZERO3)
    if launch not in ENGINES:
        if processes is not None:
            said, remedy = "goes with --launch ddp, fsdp2 or zero2", "name one; a file says its own num_processes"
            raise UserError("--num-processes", said, remedy)
        return None if launch is None else Path(launch)
    import torch
    import yaml

    from ..models.cache import cache_dir

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes is None and not gpus:
        raise UserError("--launch", f"{launch} without a GPU: how many processes is not said", "add --num-processes 2")
    if launch == "zero2" and find_spec("deepspeed") is None:
        raise UserError("--launch", "zero2 needs DeepSpeed, which is not installed", "pip install deepspeed")
    count = processes or gpus
    config = {
        "distributed_type": f"MULTI_{'GPU' if gpus else 'CPU'}" if count > 1 else "NO",
        "use_cpu": not gpus,
        "num_machines": 1,
        "num_processes": count,
        "main_process_port": 0,
        **ENGINES[launch],
    }
    file = cache_dir() / "launch" / f"{launch}-{count}-{'gpu' if gpus else 'cpu'}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, yaml.safe_dump(config))
    return file


def of_this_machine(launch: str, processes: int | None, rank: int | None) -> Path:
    """The accelerate config of one of several machines: the file, with what the command line says in its place.

    Raises:
        UserError: `--launch` names no file.
    """
    from ..models.cache import cache_dir
    from .launched import read_values

    file = Path(launch)
    if launch in ENGINES or launch == "zero3":
        said = f"{launch} says nothing of the machines"
        raise UserError("--launch", said, "give the accelerate config that `preftune run` has on machine 0")
    values = {"num_processes": processes, "machine_rank": rank}
    said_here = {key: value for key, value in values.items() if value is not None}
    if not said_here or not file.is_file():
        return file
    import yaml

    try:
        found = read_values(file)
    except (OSError, ValueError, yaml.YAMLError):
        return file  # which `check_launch` says
    text = yaml.safe_dump(found | said_here)
    made = cache_dir() / "launch" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    made.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(made, text)


ZERO3 = "DeepSpeed's ZeRO-3 keeps no weight outside the layer that is computed, and a base is tried before it trains"
INSTEAD_OF_ZERO3 = "--launch fsdp2 divides the frozen base in every kind of stage, PPO included"
