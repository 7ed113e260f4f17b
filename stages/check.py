"""What a stage's run would refuse, found without data or weights: all stages are looked at before the first trains."""

import importlib.util
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import TrainingArguments, get_scheduler

from ..errors import UserError, gathering, nearest
from ..models import seams
from ..models.auto import open_config
from ..models.cost import adapter_parameters
from ..models.starts import decays
from ..values import is_finite
from .job import StageJob
from .options import stage_config, word_problems
from .reward_models import check_reward_model
from .scorers.opening import check_source
from .trackers import reporting, tracker_problem

_TRIED = 20
"""So many steps of a schedule are tried."""


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
        args = stage_config(kind.config_class(), job, held_out=job.data.held_out > 0)
        found += _setting_problems(job, args)
        found += _best_problems(job, args)
        found += _checkpointing_problems(job, args)
        found += _package_problems(job, args)
        found += _device_problems(job, args)
        found += _expert_problems(job, args)
        found += [] if kind.check is None else kind.checker()(job, args)
        found += _start_problems(job, args)
    found += [] if job.full else _adapter_problems(job)
    for index, source in enumerate(job.rewards):
        here = f"stages.{job.name}.reward.{index}"
        with gathering(found):
            if source.kind == "model":
                size = source.settings.get("batch_size", 1)
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    found.append(UserError(f"{here}.batch_size", f"is {size!r}, expected 1 or more", "leave it out"))
                check_reward_model(str(source.target), f"{here}.model")
            elif source.kind == "stage":
                continue  # a stage of the run may not have run yet
            else:
                check_source(source.kind, source.opening(here))
    return found


def process_problems(job: StageJob, processes: int) -> Iterator[UserError]:
    """What does not divide among several processes, which only they would find."""
    policy = job.record.on_policy
    if processes == 1 or policy is None:
        return
    names = ["rollout_batch_size", *([] if policy.group is None else [policy.group]), policy.mini_batches]
    rollout, *parts = [job.method_value(name) for name in names]
    if not all(isinstance(each, int) for each in (rollout, *parts)):
        return
    if rollout % math.prod((*parts, processes)):
        words, numbers = " x ".join([*names[1:], "processes"]), " x ".join(map(str, (*parts, processes)))
        said = f"is {rollout}, expected a multiple of {words} = {numbers}"
        yield UserError(f"stages.{job.name}.rollout_batch_size", said, "correct one of them")


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
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(_TRIED),
            num_training_steps=_TRIED,
            scheduler_specific_kwargs=dict(settings),
        )
        # what one that follows a metric does is known only with the metric
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            rates = [rate for step in range(_TRIED + 1) for rate in (each(step) for each in schedule.lr_lambdas)]
            if not all(is_finite(float(rate)) for rate in rates):
                raise ValueError("its rate is not finite at every step")
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


def _best_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """What is to be the best checkpoint: only the loss on held-out rows is measured while a stage trains."""
    here, metric = f"stages.{job.name}.train", args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != "loss":
        yield UserError(f"{here}.metric_for_best_model", f"is {metric!r}, expected loss", "leave it out")
    if args.eval_on_start and args.eval_strategy == "no":
        yield UserError(f"{here}.eval_on_start", "has no effect without eval_strategy", "set that, or leave it out")
    if args.save_strategy == "best" and (metric is None or args.eval_strategy == "no"):
        remedy = "set eval_strategy, with held_out in the data, and metric_for_best_model: loss"
        yield UserError(f"{here}.save_strategy", "is best, and nothing says which is the best", remedy)


def _checkpointing_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """Names that torch's checkpointing does not take."""
    given: Any = job.train.get("gradient_checkpointing_kwargs")
    taken = set(inspect.signature(torch.utils.checkpoint.checkpoint).parameters) - {"function", "args", "kwargs"}
    for key in given if isinstance(given, dict) else ():
        if key not in taken:
            here = f"stages.{job.name}.train.gradient_checkpointing_kwargs"
            yield UserError(here, f"{key!r} is no setting of torch's checkpointing", nearest(str(key), sorted(taken)))


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
    asked = job.train.get("report_to") is not None  # the recipe's trackers are looked at once for all stages
    for name in (each for some in reporting(job) for each in some) if asked else ():
        if (refused := tracker_problem(name, f"{here}.report_to", space=job.train.get("trackio_space_id"))) is not None:
            yield refused
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


def _start_problems(job: StageJob, args: TrainingArguments) -> Iterator[UserError]:
    """An adapter that starts with a part of the base's weights, half of which stays as it is."""
    if job.lora.use_dora and job.quantization is not None:
        said = f"DoRA reads the base's weights at every forward, and they are packed in {job.quantization}"
        yield UserError("lora.use_dora", said, "leave it out, or model.quantization")
    if job.parent is not None or not job.lora.altering:
        return
    if args.weight_decay:
        yield decays(args.weight_decay, f"stages.{job.name}.train.weight_decay")
    if job.quantization is not None:
        said = f"{job.lora.init_lora_weights} takes the base's weights apart, and they are packed in {job.quantization}"
        yield UserError("lora.init_lora_weights", said, "leave it out, or model.quantization")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
