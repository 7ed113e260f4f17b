"""From a stage's `method` and `train` words to the TRL config that trains it."""

import copy
import dataclasses
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import UserError, nearest
from ..files import CHECKPOINTS
from .job import StageJob
from .kinds import EARLY_STOPPING

if TYPE_CHECKING:
    from transformers import TrainingArguments

ConfigT = TypeVar("ConfigT", bound="TrainingArguments")

# Fields that TRL's own data preparation or model loading would read. Ours come earlier, so these would do nothing.
_ELSEWHERE = {
    "output_dir": "use --output-dir",
    "max_length": "set max_length of the data entry",
    "truncation_mode": "set overflow of the data entry",
    "dataset_text_field": "set columns of the data entry",
    "dataset_kwargs": "set it in the data entry",
    "chat_template_path": "set model.chat_template",
    "eos_token": "set model.chat_template",
    "pad_token": "leave it out: the tokenizer gets a pad token that is not its EOS",
    "model_init_kwargs": "set it under model",
    "completion_only_loss": "leave it out: only assistant tokens train",
    "assistant_only_loss": "leave it out: only assistant tokens train",
    "sync_ref_model": "leave it out: the reference is the frozen parent adapter",
}


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
    check_words(job, config_class)
    parameters = {each.name: each.default for each in job.record.parameters if each.of_config}
    method = {key: value for key, value in job.method.items() if key in parameters}
    given = _with_numbers(config_class, job, {**method, **job.train})
    values: dict[str, Any] = {
        **device_defaults(job.dtype),
        "seed": job.seed,
        **copy.deepcopy(parameters),
        **defaults,
        **evaluation_defaults(job, given, held_out=held_out),
        **given,
        "output_dir": str(job.output_dir / CHECKPOINTS),
    }
    old, new = "gradient_checkpointing", "activation_checkpointing"
    if hasattr(config_class, new) and old in values:  # its new name, used so that transformers does not warn
        values.setdefault(new, values.pop(old))
    with refusals_in_words(job):
        return config_class(**values)


@contextmanager
def refusals_in_words(job: StageJob) -> Generator[None]:
    """Within it, what a config or a trainer refuses becomes a UserError: wrap their construction, nothing else."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"stages.{job.name}", " ".join(str(error).split()), "correct the value") from error


def check_words(job: StageJob, config_class: type | None = None) -> None:
    """Every key of the job's `method` and `train` is known, stands in its place and is said once.

    Args:
        config_class: whose fields `train` may name; None: that of the job's kind.

    Raises:
        UserError: an unknown key (with the nearest one), one said twice, one that belongs elsewhere.
    """
    kind = job.record
    config_class = kind.config_class() if config_class is None else config_class
    allowed = [each.name for each in kind.parameters]
    for key in job.method:
        if key not in allowed:
            raise _unknown(f"stages.{job.name}.{key}", key, allowed, f"a parameter of a {kind.name} stage")
        if key in job.train:
            raise UserError(
                f"stages.{job.name}.train.{key}",
                f"{key} is said twice, as {job.method[key]!r} beside train and as {job.train[key]!r} in it",
                "keep the one beside train",
            )
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    for key in job.train:
        if key in _ELSEWHERE:
            raise UserError(f"stages.{job.name}.train.{key}", "this key has no effect here", _ELSEWHERE[key])
        if key == EARLY_STOPPING:
            raise UserError(f"stages.{job.name}.train.{key}", "this key stands beside train", "move it one level up")
        if key not in known:
            raise _unknown(f"stages.{job.name}.train.{key}", key, known, f"a field of {config_class.__name__}")


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


def _unknown(where: str, key: str, known: Iterable[str], what: str) -> UserError:
    return UserError(where, f"{key!r} is not {what}", nearest(key, sorted(known), most=12))


def _with_numbers(config_class: type, job: StageJob, given: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads `2e-4` as text: make it the number that the field's default is."""
    kinds = {
        field.name: type(field.default)
        for field in dataclasses.fields(config_class)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool)
    }
    numbers = dict(given)
    for key, value in given.items():
        if not isinstance(value, str) or key not in kinds:
            continue
        try:
            number = float(value)
        except ValueError:
            raise UserError(
                f"stages.{job.name}.{key}", f"{value!r} is text, expected a number", "write it as 0.0002"
            ) from None
        numbers[key] = int(number) if kinds[key] is int and number.is_integer() else number
    return numbers
