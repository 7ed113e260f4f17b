"""`--launch` by name: the processes that a stage runs in, without a config to be written first."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..files import write_whole
from ..models.cache import cache_dir

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": False}},
}
"""What stands in the config beside the processes: whole copies of the base; one that is divided among them
(`models.sharded`); DeepSpeed, which divides the optimiser's state, and the weights with it."""


def launch_config(launch: str | None, processes: int | None) -> Path | None:
    """The accelerate config that `--launch` and `--num-processes` mean; None where nothing is launched.

    Raises:
        UserError: a number of processes without an engine, none where no GPU can be counted, or no DeepSpeed.
    """
    if launch not in ENGINES:
        if processes is not None:
            said, remedy = (
                "goes with --launch ddp, fsdp2, zero2 or zero3",
                "name one; a file says its own num_processes",
            )
            raise UserError("--num-processes", said, remedy)
        return None if launch is None else Path(launch)
    import torch
    import yaml

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes is None and not gpus:
        raise UserError("--launch", f"{launch} without a GPU: how many processes is not said", "add --num-processes 2")
    if launch in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise UserError("--launch", f"{launch} needs DeepSpeed, which is not installed", "pip install deepspeed")
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


def told(config: Path | None, arguments: Sequence[str]) -> Path | None:
    """The config with what the command line says behind `--` in its place, as options of `accelerate launch`.

    Raises:
        UserError: no config to say it of, no such option, or one that has no place in a config.
    """
    if not arguments:
        return config
    if config is None:
        raise UserError(f"-- {arguments[0]}", "is for accelerate, and nothing is launched", "add --launch ddp")
    import yaml
    from accelerate.commands.config.config_args import ClusterConfig

    from .launched import OF_LAUNCHER, read_values

    asked = _parsed(arguments)
    try:
        found = read_values(config)
    except (OSError, ValueError, yaml.YAMLError):
        return config  # which `check_launch` says
    known = {each.name for each in fields(ClusterConfig)} | OF_LAUNCHER
    for name, value in asked.items():
        group = _group(name)
        if name in _KINDS:
            found |= _KINDS[name]
        elif group is not None:
            found[group] = {**(found.get(group) or {}), name: value}
        elif name in known:
            found[name] = value
        else:
            raise UserError(f"-- --{name}", "has no effect on a stage's launch", "leave it out")
    for group, kind in (("deepspeed_config", "DEEPSPEED"), ("fsdp_config", "FSDP")):
        if found.get("distributed_type") != kind and any(_group(name) == group for name in asked):
            name = next(name for name in asked if _group(name) == group)
            raise UserError(f"-- --{name}", f"has no effect without {kind}", "use --launch zero2, zero3 or fsdp2")
    return _with(config, found)


_KINDS: dict[str, dict[str, Any]] = {
    "cpu": {"use_cpu": True},
    "multi_gpu": {"distributed_type": "MULTI_GPU"},
    "use_deepspeed": {"distributed_type": "DEEPSPEED"},
    "use_fsdp": {"distributed_type": "FSDP"},
}
"""Options of accelerate's that a config says with another key."""


def _group(name: str) -> str | None:
    """Where in a config an option of accelerate's stands, if not at its top."""
    if name.startswith(("zero", "offload_", "gradient_", "deepspeed_")):
        return "deepspeed_config"
    groups = ("fsdp_", "dynamo_", "parallelism_config_", "megatron_lm_", "fp8_")
    prefix = next((each for each in groups if name.startswith(each)), None)
    return None if prefix is None else f"{prefix.removesuffix('_').removesuffix('_config')}_config"


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """What the options say, by accelerate's own names for them; those that are left out are not in it."""
    from accelerate.commands.launch import launch_command_parser

    def refuse(message: str) -> NoReturn:
        raise UserError(f"-- {' '.join(arguments)}", message, "accelerate launch --help lists the options")

    parser = launch_command_parser()
    parser.error = refuse
    nothing = vars(parser.parse_args(["script"]))
    asked = vars(parser.parse_args([*arguments, "script"]))
    if asked["training_script"] != "script" or asked["training_script_args"]:
        refuse(f"{asked['training_script']!r} belongs to no option")
    # `nondefault` is where accelerate itself notes which were given
    return {name: each for name, each in asked.items() if name != "nondefault" and each != nothing[name]}


def of_this_machine(launch: str, processes: int | None, rank: int | None, arguments: Sequence[str] = ()) -> Path:
    """The accelerate config of one of several machines: the file, or what the engine's name means, with what the
    command line says in its place.

    Args:
        arguments: what stands behind `--`.

    Raises:
        UserError: as of `launch_config` and `told`.
    """
    named = launch in ENGINES
    config = told(launch_config(launch, processes if named else None), arguments)
    assert config is not None
    values = {"num_processes": None if named else processes, "machine_rank": rank}
    said = {key: value for key, value in values.items() if value is not None}
    return _with(config, said) if said else config


def _with(config: Path, said: Mapping[str, Any]) -> Path:
    """A config with some values in the place of its own."""
    import yaml

    from .launched import read_values

    try:
        text = yaml.safe_dump({**read_values(config), **said})
    except (OSError, ValueError, yaml.YAMLError):
        return config  # which `check_launch` says
    made = cache_dir() / "launch" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    made.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(made, text)
