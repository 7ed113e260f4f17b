"""What a stage's run would refuse, found without data or weights: all stages are looked at before the first trains."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from ..errors import UserError, gathering, nearest
from ..models import seams
from ..models.auto import check_model, open_config
from ..models.cost import adapter_parameters
from .job import StageJob
from .options import stage_config, word_problems
from .reward_functions import import_function

_PACKAGES = {
    "azure_ml": "azureml",
    "flyte": "flytekit",
    **{
        name: name
        for name in (
            *("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow", "neptune", "swanlab"),
            *("tensorboard", "trackio", "wandb"),
        )
    },
}
"""What Transformers reports to -> the module that it needs."""


def stage_problems(job: StageJob) -> list[UserError]:
    """Everything that is wrong with a stage's settings: its config is built for good, with optimiser and schedule.

    Args:
        job: its folders need not be there; of its base only the config is read, where there is one.
    """
    kind = job.record
    found = word_problems(job)
    if found:
        return found
    with gathering(found):
        args = stage_config(kind.config_class(), job, held_out=job.data.held_out > 0 and kind.on_policy is None)
        found += _setting_problems(job, args)
        found += _package_problems(job, args)
        found += _device_problems(job, args)
        found += _expert_problems(job, args)
        found += [] if kind.check is None else kind.checker()(job, args)
    found += _adapter_problems(job)
    for index, source in enumerate(job.rewards):
        where = f"stages.{job.name}.reward.{index}"
        with gathering(found):
            if isinstance(source.target, str) and source.kind == "function":
                import_function(source.target, where)
            elif source.kind == "model" and (folder := Path(str(source.target)).expanduser()).is_dir():
                check_model(folder, where)
                open_config(folder, where)
    return found


def _setting_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """The optimiser and the schedule, tried on one parameter; values that only some stages take."""
    here = f"stages.{job.name}.train"
    try:
        cls, kwargs = _optimizer(args)
        optimizer = cls([torch.nn.Parameter(torch.zeros(2))], **{"lr": args.learning_rate, **kwargs})
    except Exception as error:  # the libraries refuse in every way there is
        said = " ".join(str(error).split()) or type(error).__name__
        yield UserError(f"{here}.optim", f"{getattr(args.optim, 'value', args.optim)!r}: {said}", "take another one")
        return
    try:
        settings: Any = args.lr_scheduler_kwargs or {}
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=dict(settings),
        )
    except Exception as error:  # as above
        said = " ".join(str(error).split()) or type(error).__name__
        yield UserError(f"{here}.lr_scheduler_type", said, "correct lr_scheduler_type or lr_scheduler_kwargs")
    if args.neftune_noise_alpha is not None and job.packed:
        said = "its noise is scaled by a row's length, and packed rows are longer"
        yield UserError(f"{here}.neftune_noise_alpha", said, "set model.packed to false")
    sampling, rows = args.train_sampling_strategy, job.record.rows
    if sampling == "group_by_length" and rows != "demo":
        said = f"is {sampling!r}, which a {job.record.name} stage cannot do"
        yield UserError(f"{here}.train_sampling_strategy", said, "leave it out")


def _optimizer(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """The optimiser's class and its keywords, as `Trainer.get_optimizer_cls_and_kwargs` finds them."""
    with seams.importing(seams.OPTIMIZERS):
        from transformers.trainer_optimizer import (
            _OPTIMIZER_HANDLERS,  # pyright: ignore[reportPrivateUsage]  # seam optimizers
            OptimizerContext,
            _parse_optim_args,  # pyright: ignore[reportPrivateUsage]  # seam optimizers
        )

    given = OptimizerContext(
        args=args,
        model=None,
        optimizer_kwargs={"lr": args.learning_rate},
        adam_kwargs={"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
        optim_args=_parse_optim_args(args.optim_args if isinstance(args.optim_args, str) else None),
    )
    handler = _OPTIMIZER_HANDLERS.get(args.optim)
    if handler is None:
        raise ValueError(f"Trainer cannot instantiate unsupported optimizer: {args.optim}")
    return handler(given)


def _device_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """What has no effect, or fails, without a GPU."""
    if torch.cuda.is_available():
        return
    for key in ("fp16", "activation_offloading"):
        if getattr(args, key, False):
            yield UserError(f"stages.{job.name}.train.{key}", "needs a GPU, and there is none", "leave it out")


def _package_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """What is asked for and not installed."""
    here = f"stages.{job.name}.train"
    for name in args.report_to or ():
        if name not in _PACKAGES:
            yield UserError(f"{here}.report_to", f"{name!r} is no tracker", nearest(name, _PACKAGES))
        elif not (_installed(_PACKAGES[name]) or (name == "tensorboard" and _installed("tensorboardX"))):
            yield UserError(f"{here}.report_to", f"{name} is not installed", f"pip install {_PACKAGES[name]}")
    if args.use_liger_kernel and not _installed("liger_kernel"):
        yield UserError(f"{here}.use_liger_kernel", "liger-kernel is not installed", "pip install liger-kernel")


def _expert_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """A router's loss where there is no router."""
    if getattr(args, "router_aux_loss_coef", None) and (job.base.path / "config.json").is_file():
        config = open_config(job.base.path).get_text_config()
        if not hasattr(config, "output_router_logits"):
            here = f"stages.{job.name}.train.router_aux_loss_coef"
            yield UserError(here, f"{job.base.spec} is no mixture of experts", "leave it out")


def _adapter_problems(job: StageJob) -> Iterator[UserError]:
    """Target modules that no layer has, by PEFT itself on a model without memory."""
    if not (job.base.path / "config.json").is_file():
        return
    config = open_config(job.base.path)
    if job.lora.r > (width := config.get_text_config().hidden_size):
        said = f"is {job.lora.r}, more than the base's width, {width}"
        yield UserError("lora.r", said, f"use at most {width}, with which an adapter can say anything")
        return
    try:
        adapter_parameters(config, job.lora)
    except UserError as error:
        yield error
    except ValueError as error:
        if "arget module" in str(error):
            targets = job.lora.target_modules
            said = f"no layer of the base is called {targets if isinstance(targets, str) else ' or '.join(targets)}"
            yield UserError("lora.target_modules", said, "use all-linear, or names such as q_proj")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
