"""From a stage's `method` and `train` words to the TRL config that trains it."""

import copy
import dataclasses
import re
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, nearest, raise_found
from ..files import CHECKPOINTS
from .checkpoints import accumulation
from .fields import PARAMETER, Field, fields_of
from .job import StageJob
from .kinds import EARLY_STOPPING, Parameter
from .names import meant
from .trackers import reporting

if TYPE_CHECKING:
    from transformers import TrainingArguments

ConfigT = TypeVar("ConfigT", bound="TrainingArguments")

_CHECKPOINTS_ASKED = ("save_strategy", "save_steps", "save_total_limit")


def device_defaults(dtype: str = "float32") -> dict[str, Any]:
    """What TRL's and Transformers' configs need on this device, where the recipe says nothing.

    Without an accelerator: `use_cpu`, no gradient checkpointing, no pinned memory. `bf16` (autocast) follows the
    model's dtype: on a bf16 base it keeps the LoRA weights in fp32 and computes with them in bf16, which measured a
    fifth faster on a CPU than PEFT's casts to fp32; a float32 base is left in float32 everywhere.
    """
    values: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 5,
        "logging_first_step": True,
        "disable_tqdm": not sys.stderr.isatty(),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16" and torch.cuda.is_available(),
    }
    if not torch.cuda.is_available():
        values |= {
            "use_cpu": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
        }
    return values


def stage_config(config_class: type[ConfigT], job: StageJob, *, held_out: bool, **defaults: Any) -> ConfigT:
    """The TRL config of a stage: our defaults, then the method's parameters, then what `train` says.

    Args:
        config_class: TRL's config of the stage.
        job: its `method`, `train`, `dtype`, `seed` and `output_dir` are read.
        held_out: whether there are held-out rows to evaluate on.
        defaults: defaults of this kind of stage.

    Raises:
        UserError: an unknown key (naming the nearest), one said twice, one that belongs elsewhere, a value that the
            config refuses.
    """
    raise_found(word_problems(job, config_class))
    kind, parameters = job.record, {each.name: each.default for each in job.record.parameters if each.of_config}
    method = {key: value for key, value in job.method.items() if key in parameters}
    fields = fields_of(config_class)
    given = {key: fields[key].meaning.read(value) if key in fields else value for key, value in job.train.items()}
    given = {**method, **given}
    values: dict[str, Any] = {
        **device_defaults(job.dtype),
        "seed": job.seed,
        "run_name": job.name,
        **copy.deepcopy(parameters),
        **kind.defaults,
        **defaults,
        **evaluation_defaults(job, given, held_out=held_out),
        **({"save_strategy": "steps"} if keeps_checkpoints(job) else {}),
        **given,
        # the others are written to by `trackers.Tracking`
        "report_to": reporting(job)[1] or "none",
        "output_dir": str(job.output_dir / CHECKPOINTS),
    }
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if hasattr(config_class, new) and old in values:  # its new name, used so that transformers does not warn
        values.setdefault(new, values.pop(old))
    with refusals_in_words(job):
        args = one_device(config_class(**values))
    if job.record.on_policy is None:
        # one that goes on in another number of processes takes the steps that it took
        steps = args.gradient_accumulation_steps
        args.gradient_accumulation_steps = accumulation(Path(str(args.output_dir)), steps, args.world_size)
    return args


def one_device(args: ConfigT) -> ConfigT:
    """The same config, for a process that uses one GPU however many it sees.

    With more the Trainer would wrap the model in DataParallel, whose replicas run forwards that are bound to the
    original; TRL's trainers refuse it. The Trainer has no public setting for that.
    """
    args._n_gpu = min(args.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]: see above
    return args


def keeps_checkpoints(job: StageJob) -> bool:
    """Whether the recipe asks for checkpoints: those stay in the finished stage's folder."""
    return any(job.train.get(key) is not None for key in _CHECKPOINTS_ASKED) and job.train.get("save_strategy") != "no"


@contextmanager
def refusals_in_words(job: StageJob) -> Generator[None]:
    """Within it, what a config or a trainer refuses becomes a UserError: wrap their construction, nothing else."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"stages.{job.name}{_blamed(job, said)}", said, "correct the value") from error


def _blamed(job: StageJob, said: str) -> str:
    """The key that a library's message is about, by its name or its value in it; empty where that is unclear."""
    grouped = {name: f"{group}.{key}" for group, keys in job.record.groups.items() for key, name in keys.items()}
    places = {f".{grouped.get(key, key)}": key for key in job.method} | {f".train.{key}": key for key in job.train}
    values = {**job.method, **job.train}
    # the one that comes first: a message begins with what is wrong, and goes on with what it must fit
    found = {place: where.start() for place, key in places.items() if (where := re.search(rf"\b{key}\b", said))}
    named = sorted(found, key=lambda place: found[place])
    named = named or [place for place, key in places.items() if isinstance(values[key], str) and values[key] in said]
    return named[0] if named else ""


def word_problems(job: StageJob, config_class: type | None = None) -> list[UserError]:
    """What is wrong with the words and values of the job's `method` and `train`, each by itself.

    Args:
        config_class: whose fields `train` may name; None: that of the job's kind.

    Returns:
        An error for each unknown key (with the nearest one), one said twice, one that has no effect or belongs
        elsewhere, and each value that its field does not take.
    """
    kind = job.record
    config_class = kind.config_class() if config_class is None else config_class
    allowed, found = [each.name for each in kind.parameters], []
    for key, value in job.method.items():
        here = f"stages.{job.name}.{key}"
        if key not in allowed:
            found.append(UserError(here, f"{key!r} is not a parameter of a {kind.name} stage", nearest(key, allowed)))
        elif key in job.train:
            said = f"{key} is said twice, as {value!r} beside train and as {job.train[key]!r} in it"
            found.append(UserError(f"stages.{job.name}.train.{key}", said, "keep the one beside train"))
        elif (wanted := _unfit(kind.parameter(key), value)) is not None:
            found.append(UserError(here, f"is {value!r}, expected {wanted}", "correct the value"))
    fields, defaults = fields_of(config_class), {each.name: each.default for each in dataclasses.fields(config_class)}
    refused: dict[str, UserError] = {}
    for key, value in job.train.items():
        unset = value in (None, False) and key in defaults and defaults[key] == value
        if key in job.method or (unset and key in fields and fields[key].state != "works"):
            continue  # said above; or says nothing
        if (error := _field_problem(job, key, value, fields, config_class)) is None:
            continue
        # fields that are refused for one reason are said together
        if key in fields and fields[key].state != "works" and (first := refused.get(error.remedy)) is not None:
            found[found.index(first)] = refused[error.remedy] = UserError(
                first.where, f"{first.problem}, and so does {key}", first.remedy
            )
            continue
        refused[error.remedy] = error
        found.append(error)
    return found


def _field_problem(
    job: StageJob, key: str, value: object, fields: Mapping[str, Field], config_class: type
) -> UserError | None:
    """What is wrong with one key of `train`."""
    here, kind = f"stages.{job.name}.train.{key}", job.record
    if key == EARLY_STOPPING:
        return UserError(here, "this key stands beside train", "move it one level up")
    if key not in fields:
        known = [name for name, field in fields.items() if field.state == "works"]
        remedy = meant(key, "train", kind, job.name) or nearest(key, sorted(known), most=12)
        return UserError(here, f"{key!r} is not a field of {config_class.__name__}", remedy)
    field = fields[key]
    if field.state != "works":
        return UserError(
            here, "has no effect here" if field.state == "meaningless" else "belongs elsewhere", field.says
        )
    if field is PARAMETER:
        wanted = _unfit(kind.parameter(key), value) if any(each.name == key for each in kind.parameters) else None
    elif value is None:
        wanted = None if field.optional else field.meaning.words
    else:
        wanted = None if field.meaning.fits(field.meaning.read(value)) else field.meaning.words
    if wanted is None:
        return None
    said = f"is {value!r}{' (text)' if isinstance(value, str) and field.meaning.number else ''}, expected {wanted}"
    return UserError(here, said, "leave it out for the default" if value is None else "correct the value")


def _unfit(parameter: Parameter, value: object) -> str | None:
    """What a parameter should be, in words; None where the value is that."""
    try:
        if value is not None:
            TypeAdapter[Any](parameter.type).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{first['msg'][0].lower()}{first['msg'][1:]}".removeprefix("input should be ")
    return None


def evaluation_defaults(job: StageJob, given: Mapping[str, Any], *, held_out: bool) -> dict[str, Any]:
    """Evaluate every epoch where rows are held out; keep the best checkpoint where early stopping is asked for."""
    patience = job.method.get(EARLY_STOPPING)
    asked = str(given.get("eval_strategy", "no")) != "no" or given.get("load_best_model_at_end") or patience is not None
    if not held_out:
        if asked:
            raise UserError(
                f"stages.{job.name}",
                "evaluation during training is asked for, but no rows are held out",
                f"set data.{job.data_name}.held_out to a fraction such as 0.1",
            )
        return {}
    values: dict[str, Any] = {"eval_strategy": "epoch"}
    if given.get("load_best_model_at_end") or patience is not None:
        strategy = given.get("eval_strategy", "epoch")
        values |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False if given.get("metric_for_best_model", "eval_loss") == "eval_loss" else None,
            "save_strategy": strategy,
            "save_total_limit": 1,
        }
        if "eval_steps" in given:
            values["save_steps"] = given["eval_steps"]
    return values
