"""What an accelerate config may ask of a launched stage. What would have no effect here, or another one than it says,
is refused in words: most of it accelerate itself passes over, or hands to a model that is not ours to divide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
"""The kinds of processes that a stage has been run in."""
_ADAPTERS = "divides single weights, which adapters on all linear layers cannot take"
_SIZES = {
    "tp_size": f"tensor parallelism {_ADAPTERS}",
    "cp_size": "context parallelism divides a row among processes, and here a process computes whole rows",
    "sp_size": "sequence parallelism divides a row among processes, and here a process computes whole rows",
    "pp_size": "pipeline parallelism gives each process other layers, and here each computes all of them",
    "dp_replicate_size": "the base is divided among all processes, not within groups of them",
}
"""The sizes of accelerate's ParallelismConfig beside `dp_shard_size`, and why none may be above 1."""
_INSTEAD = "--launch fsdp2 divides the frozen base among all processes, in every kind of stage"


def kind_of(found: Any) -> str:
    """`NO`, `MULTI_GPU`, `FSDP`, ...: accelerate's word, also where it stands as text."""
    return str(getattr(found.distributed_type, "value", found.distributed_type))


def check_precision(config: Path, found: Any, dtype: str) -> None:
    """Whether the config's precision, if it names one, is the recipe's.

    Raises:
        UserError: it is another.
    """
    precision = str(found.mixed_precision or "no").lower()
    if precision != "no" and {"bf16": "bfloat16", "fp16": "float16"}.get(precision) != dtype:
        said = f"{config}: mixed_precision {precision}, and the recipe's model.dtype is {dtype}"
        raise UserError("--launch", said, "write mixed_precision: 'no' there: the recipe says it for every stage")


def check_asked(config: Path, found: Any) -> None:
    """Whether everything that the config asks for has its effect in a stage.

    Args:
        found: the config, as accelerate has read it.

    Raises:
        UserError: something does not.
    """
    for problem, remedy in (*_wrong_kinds(found), *_wrong_sizes(found), *_wrong_values(found)):
        raise UserError("--launch", f"{config}: {problem}", remedy)


_Wrong = list[tuple[str, str]]
"""Problems, each with its remedy."""


def _wrong_kinds(found: Any) -> _Wrong:
    kind, wrong = kind_of(found), []
    if str(getattr(found.compute_environment, "value", found.compute_environment)) != "LOCAL_MACHINE":
        wrong.append(("a job of SageMaker's is not started from here", "write a config for this machine"))
    elif kind not in _KINDS:
        said = f"distributed_type {kind} is none that stages run in"
        if kind == "MEGATRON_LM":
            said += f"; Megatron's tensor parallelism {_ADAPTERS}"
        wrong.append((said, f"use one of {', '.join(_KINDS)}; {_INSTEAD}"))
    elif kind == "NO" and _size(found.num_processes) > 1:
        said = f"distributed_type NO starts one process, and num_processes is {found.num_processes}"
        wrong.append((said, "write MULTI_GPU or MULTI_CPU, or num_processes: 1"))
    return wrong


def _wrong_sizes(found: Any) -> _Wrong:
    """Ways of dividing a model that are none of ours."""
    # accelerate writes each as `parallelism_config_tp_size`
    asked = {key.removeprefix("parallelism_config_"): value for key, value in found.parallelism_config.items()}
    wrong = [
        (f"parallelism_config asks for {name} {asked[name]}: {why}", _INSTEAD)
        for name, why in _SIZES.items()
        if _size(asked.get(name)) > 1
    ]
    shard, whole = _size(asked.get("dp_shard_size")), _size(found.num_processes)
    if shard > 1 and (kind_of(found) != "FSDP" or shard != whole):
        said = f"parallelism_config asks for dp_shard_size {shard} of {whole} processes ({kind_of(found)})"
        wrong.append((f"{said}: {_SIZES['dp_replicate_size']}", _INSTEAD))
    if kind_of(found) == "DEEPSPEED":
        size = _deepspeed_file(found.deepspeed_config).get("tensor_parallel", {}).get("autotp_size", 0)
        if _size(size) > 1:
            wrong.append((f"its DeepSpeed config asks for autotp_size {size}: {_SIZES['tp_size']}", _INSTEAD))
    return wrong


def _size(value: object) -> int:
    """How many; nothing is 1, and what is no number is as good as too many: it is refused with the value."""
    words = str(value or 1)
    return int(words) if words.lstrip("-").isdecimal() else 2


def _wrong_values(found: Any) -> _Wrong:
    """What the recipe says, or nobody."""
    wrong: _Wrong = []
    dynamo = found.dynamo_config or {}
    backend = str(dynamo.get("dynamo_backend") or dynamo.get("backend") or "no").lower()
    if backend != "no":
        said = f"dynamo_backend {backend}: the forwards of this package are not compiled"
        wrong.append((said, "leave dynamo_config out"))
    fsdp = {key.removeprefix("fsdp_") for key, value in found.fsdp_config.items() if str(value).lower() == "true"}
    if "offload_params" in fsdp:
        wrong.append(("fsdp_offload_params: a share of the base stays on its device", "leave it out"))
    if "activation_checkpointing" in fsdp:
        said = "fsdp_activation_checkpointing: a stage's own config says whether activations are kept"
        wrong.append((said, "leave it out, and write train: {gradient_checkpointing: true} in the recipe"))
    return wrong


def _deepspeed_file(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's own file says, where the config names one."""
    named = asked.get("deepspeed_config_file")
    if not named or named == "none":
        return {}
    try:
        found = json.loads(Path(named).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "no JSON"
        raise UserError("--launch", f"deepspeed_config_file {named}: {said}", "name a file that can be read") from error
    return found if isinstance(found, dict) else {}
