"""What the SFT, reward, DPO and KTO stages share: token ids in, one training loop, one set of measures."""

import logging
import math
import os
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..errors import UserError
from ..files import LOG, LOGS, PROGRESS
from ..models import seams
from ..models.causal import head_of, inner_model
from ..models.described import has_experts
from ..models.dropout import dropout_rate, no_dropout
from ..models.lm_head import use_compact_head
from ..models.memory import peak_memory_bytes
from ..models.pickles import check_pickles
from ..models.quiet import quiet_transformers
from ..models.sharded import is_sharded
from ..progress import say
from .callbacks import Clock, HandingBack, LogFile, ProgressBar, StepFile, clock_of, keep_event_files
from .checkpoints import (
    Continuing,
    Progress,
    Resumable,
    agreed,
    checkpoints,
    continuing,
    log_bytes,
    newest_for_all,
    read_progress,
    restore_stopping,
    salvage,
)
from .finite import Skips, not_finite, rows_of
from .global_batch import GlobalBatch, say_own_batches
from .job import StageJob
from .kinds import EARLY_STOPPING
from .trackers import Tracking, closing_trackers

logger = logging.getLogger(__name__)
NO_AUX: dict[str, Any] = {"router_aux_loss_coef": 0.0}
"""Defaults of SFT, DPO and KTO: a frozen router has nothing to balance, so the loss of a mixture of experts is that of
any other model. Who sets the coefficient finds the load-balancing loss in the log as `aux_loss`."""


class StageTrainer(GlobalBatch, Resumable):
    """Mixed in before a TRL trainer: its data are encoded already, its LM head is ours where Triton does not run.

    Evaluation inside the loop is timed, so that it does not count as training.
    """

    compact_head = True
    mean_logits = False
    evaluate_seconds = 0.0
    _measured: tuple[float | None, float | None] = (None, None)
    _source: tuple[str, Any, Sequence[str]] = ("training", None, ())
    overridden: tuple[seams.Seam, ...] = (seams.PREPARE_DATASET, seams.GRAD_NORM, seams.EPOCHS, seams.BATCHES)
    """TRL's methods that stand differently here, and that TRL must go on calling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for each in self.overridden:
            seams.require(each, type(self))
        self.skips = Skips()
        self._bad: tuple[str, float] | None = None
        config = kwargs["args"]
        if config.world_size > 1 and config.ddp_find_unused_parameters is None:
            # what trains is used in every step; of a mixture's experts some may not be
            config.ddp_find_unused_parameters = has_experts(kwargs["model"].config)
        with _without_rename_warnings(), _in_full_precision(kwargs["model"]):
            super().__init__(*args, **kwargs)
        if is_sharded(kwargs["model"]):
            seams.require(seams.SHARDED_BASE, self)
            # No DistributedDataParallel, which would compare and send what is divided: the Trainer averages the
            # gradients of what is not. Said after its constructor, which would refuse checkpoints of what is whole.
            self.is_distributed_loading_by_transformers = True
        self._use_compact_head()

    def _prepare_dataset(self, dataset: Any, *args: object, **kwargs: object) -> Any:
        return dataset

    def _use_compact_head(self) -> None:
        """Ours, but for TRL's kernel on a GPU, WPO's weights (`log_sum_sq_probs`) and a mixture's auxiliary loss.

        Raises:
            UserError: the base's log-probs cannot be reproduced, or not with what is asked for.
        """
        if not self.compact_head:
            return
        assert self.model is not None
        self._put_head(self.model)

    def _put_head(self, model: torch.nn.Module) -> None:
        # tried as training runs it: within a forward that accelerate has wrapped, a trial would leave autocast on
        with self.accelerator.autocast():
            self._replace_head(inner_model(model))

    def _replace_head(self, causal: Any) -> None:
        seams.require(seams.TRL_SETTINGS, self.args)
        asked = {
            "use_weighting": getattr(self.args, "use_weighting", False),
            "router_aux_loss_coef": getattr(self, "aux_loss_enabled", False),
        }
        more = [name for name, wanted in asked.items() if wanted]
        if asked["router_aux_loss_coef"] and not hasattr(causal.config.get_text_config(), "num_experts"):
            problem = f"TRL cannot make the load-balancing loss of a {type(causal).__name__}"
            raise UserError("train.router_aux_loss_coef", problem, "leave it out")
        head = head_of(causal)
        odd = head.own is not None or causal.base_model is causal
        if more and (odd or head.rows is not None):
            has = "rows of its head that train" if head.rows is not None else "a head of its own"
            said = f"{type(causal).__name__} has {has}, which TRL's does not know"
            raise UserError(f"train.{more[0]}", said, "drop it")
        if odd or head.rows is not None or not (more or self.args.device.type in ("cuda", "xpu")):
            use_compact_head(causal, mean_logits=self.mean_logits)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with quiet_transformers():  # a bar for each file
            super()._save(*args, **kwargs)

    def came_from(self, job: StageJob, dataset: Any, origins: Sequence[str]) -> None:
        """Say where the rows come from (their encoded form and their origins, for messages), and how many steps on
        them may be left out."""
        self._source, self.skips.allowed = (f"stages.{job.name}", dataset, origins), job.nonfinite_skips
        say_own_batches(job.name, self.args, ["aux_loss"] if getattr(self, "aux_loss_enabled", False) else [])

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._batch = inputs
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(value := float(loss)):
            if not self.skips.allowed:
                raise self._not_finite("the loss", value)
            self._bad = ("the loss", value)
            return torch.zeros_like(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # with a gradient scaler (fp16) an overflow is part of the method: that step is left out
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self._bad = self._bad or ("the gradient's norm", float(norm))
        bad, self._bad = self._bad, None
        if bad is None and not (self.skips.allowed and self.args.world_size > 1):
            return norm
        if not agreed(self.args, int(bad is not None))[0]:
            return norm
        if not self.skips.take():
            raise self._not_finite(*(bad or ("the loss of another process", math.nan)))
        # an optimiser passes by what has no gradient
        optimizer: Any = self.optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return None

    def _not_finite(self, what: str, value: float) -> UserError:
        where, dataset, origins = self._source
        rows = rows_of(self._batch, dataset, origins)
        kept = checkpoints(Path(str(self.args.output_dir)))
        good = str(kept[-1][1]) if kept else None
        return not_finite(where, self.state.global_step + 1, what, value, rows, skips=self.skips, good=good)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.skips.said()}, *args, **kwargs)

    # How a run continues exactly: what the Trainer's own checkpoints leave out.

    def progress(self) -> Progress:
        seams.require(seams.TRAINED_TOKENS, self)
        trl: Any = self
        norm, rate = self._measured
        return Progress(
            loss=float(self._tr_loss),
            logged_step=self._globalstep_last_logged,
            total_loss=float(self._total_loss_scalar),
            metrics={name: list(values) for name, values in trl._metrics["train"].items()},
            tokens=trl._total_train_tokens,
            seconds=clock_of(self).spent(),
            evaluate_seconds=self.evaluate_seconds,
            log_bytes=log_bytes(Path(str(self.args.output_dir)).parent),
            epoch_ends=self._step_ended(),
            skipped=self.skips.done,
            more={"logged": self.skips.logged}
            | ({"grad_norm": norm, "learning_rate": rate} if norm is not None and rate is not None else {}),
        )

    def _step_ended(self) -> bool:
        """Whether an epoch's last step has been made, and what follows it is still to come."""
        own = continuing(self)
        over = self.state.global_step >= self.state.max_steps or float(self.state.epoch or 0.0).is_integer()
        return own is not None and own.step_ended and over

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        rate = kwargs.get("learning_rate")
        self._measured = (None if grad_norm is None else float(grad_norm), None if rate is None else float(rate))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _run_epoch(self, *args: Any, **epoch: Any) -> None:
        if self.resumed is not None:
            ended = self.resumed.epoch_ends
            self._take_up(self.resumed, epoch)
            if self.control.should_training_stop:
                return
            # the random numbers went on while the epoch ended; they are not to be set back
            epoch |= {"resume_from_checkpoint": None} if ended else {}
        super()._run_epoch(*args, **epoch)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        before = clock_of(self).seconds
        if self.resumed is not None:  # no epoch was left
            epoch = {"model": self.model_wrapped, "trial": trial, "epoch": 0, "ignore_keys_for_eval": None}
            self._take_up(self.resumed, {**epoch, "start_time": start_time})
        return super()._finalize_training(trial, num_train_samples, start_time - before)

    def _take_up(self, done: Progress, epoch: dict[str, Any]) -> None:
        """Go on where the checkpoint was written, which may be before an epoch's evaluation."""
        trl: Any = self
        self.resumed = None
        self._tr_loss = torch.tensor(done.loss, device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = done.total_loss, done.logged_step
        self._initial_global_step = self._initial_num_input_tokens_seen = 0
        for name, values in done.metrics.items():
            trl._metrics["train"][name] = values
        trl._total_train_tokens = done.tokens
        self.evaluate_seconds = done.evaluate_seconds
        self.skips.done, self.skips.logged = done.skipped, int(done.more["logged"])
        stopped = restore_stopping(self, Path(str(self.continued)))
        if done.epoch_ends:
            self._load_rng_state(self.continued)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            norm, rate = done.more.get("grad_norm"), done.more.get("learning_rate")
            rest = (epoch["model"], epoch["trial"], epoch["epoch"], epoch["ignore_keys_for_eval"], epoch["start_time"])
            self._maybe_log_save_evaluate(self._tr_loss, norm, *rest, learning_rate=rate)
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        began = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.evaluate_seconds += time.perf_counter() - began


def stage_callbacks(job: StageJob) -> list[TrainerCallback]:
    """The callbacks of every trainer of ours: log.jsonl, progress, clock, checkpoints to continue from, trackers, and
    early stopping if asked for."""
    callbacks: list[TrainerCallback] = [LogFile(job.output_dir / LOG), StepFile(job.output_dir / PROGRESS)]
    callbacks += [ProgressBar(job.name), Clock(), HandingBack()]
    callbacks.append(Continuing(job.name, job.continuing()))
    callbacks.append(Tracking(job))
    if (patience := job.method.get(EARLY_STOPPING)) is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=int(patience)))
    return callbacks


def train(trainer: Trainer, rows: int) -> dict[str, float | None]:
    """Train, from the last checkpoint if an interrupted run left one, and evaluate at the end if rows are held out.

    Args:
        trainer: with `stage_callbacks`.
        rows: length of the training set.

    Returns:
        train_seconds (the loop alone, without evaluation), examples_per_second, tokens_per_second,
        peak_memory_bytes, steps, epochs, train_loss (mean over the run), final_loss and the last `eval_*` metrics.
    """
    keep_event_files(trainer, Path(str(trainer.args.output_dir)).parent / LOGS)
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    checkpoint = take_up(trainer)
    with _without_rename_warnings(), closing_trackers(trainer):
        output = trainer.train(resume_from_checkpoint=checkpoint)
        seconds = max(clock_of(trainer).seconds - getattr(trainer, "evaluate_seconds", 0.0), 1e-9)
        peak = peak_memory_bytes()
        if trainer.eval_dataset is not None and not _evaluated_last(trainer):
            trainer.evaluate()
    seams.require(seams.TRAINED_TOKENS, trainer)
    tokens: Any = trainer
    history = trainer.state.log_history
    epochs = _epochs(trainer)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last_eval = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    speeds = ("_runtime", "_per_second", "epoch", "step")
    return {
        "train_seconds": seconds,
        "examples_per_second": epochs * rows / seconds,
        "tokens_per_second": tokens._total_train_tokens / seconds,
        "peak_memory_bytes": peak,
        "steps": trainer.state.global_step,
        "epochs": epochs,
        "train_loss": output.training_loss,
        "final_loss": losses[-1] if losses else output.training_loss,
        **{key: value for key, value in last_eval.items() if not key.endswith(speeds)},
    }


def take_up(trainer: Trainer) -> str | None:
    """Get ready to continue from the newest checkpoint that an interrupted run of the same stage left, which is said.

    Args:
        trainer: a `Resumable` one with `stage_callbacks`; any other starts anew.

    Returns:
        The checkpoint; None where there is none.
    """
    args = trainer.args
    own = continuing(trainer)
    if own is None or not isinstance(trainer, Resumable):
        return None
    if own.plan is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # torch and DeepSpeed read such a checkpoint's pickles without a limit
        if args.process_index == 0:
            logger.warning("%s: no checkpoint is written to continue from: its engine writes its own kind", own.name)
        own.plan = None
    folder = Path(str(args.output_dir))
    if args.process_index == 0:
        salvage(folder)
    trainer.accelerator.wait_for_everyone()  # all must find the same ones
    checkpoint = newest_for_all(folder, own.name, args, of_any_number=trainer.of_any_number)
    if checkpoint is None:
        return None
    check_pickles(checkpoint)
    done = trainer.resumed = read_progress(checkpoint, args.process_index, args.world_size)
    clock_of(trainer).seconds = done.seconds
    log = folder.parent / LOG
    if args.process_index == 0 and log.is_file() and log.stat().st_size > done.log_bytes:
        os.truncate(log, done.log_bytes)
    if args.process_index == 0:
        say(f"{own.name}: continues after step {checkpoint.name.rpartition('-')[2]}")
    args.eval_on_start = False
    trainer.continued = str(checkpoint)
    return str(checkpoint)


def check_identity(trainer: Any, beta: float) -> None:
    """At step 0 the policy IS the reference, so every log-ratio is 0 (D1): look at the first batch's metrics.

    Both sides are one computation on equal weights, so they agree far better than the tolerance: 1e-3 nats in the
    summed log-probability, or in bf16 what rounding may do to a sum of that size. Nothing is dropped
    (`settle_dropout`).

    Raises:
        RuntimeError: the reference is not what the policy started from.
    """
    seams.require(seams.METRICS, trainer)
    metrics = trainer._metrics["train"]
    if not (metrics.get("rewards/chosen") or metrics.get("rewards/rejected")):
        raise seams.METRICS.moved(["rewards/chosen and rewards/rejected"])
    low = trainer.args.bf16 or trainer.args.fp16 or trainer.model.dtype != torch.float32
    precision = torch.finfo(torch.bfloat16 if low else torch.float32).eps
    for side in ("chosen", "rejected"):
        if not metrics.get(f"rewards/{side}"):
            continue  # a KTO batch without this side
        ratio = metrics[f"rewards/{side}"][-1] / beta if beta else 0.0
        tolerance = max(1e-3, precision * math.sqrt(abs(metrics[f"logps/{side}"][-1])))
        # what is no number is refused with its rows, right after
        if math.isfinite(ratio) and abs(ratio) > tolerance:
            raise RuntimeError(
                f"step 0: log pi - log pi_ref of the {side} responses is {ratio:.4g} nats, expected 0 within "
                f"{tolerance:.2g}: the reference is not the adapter that this stage started from"
            )


def settle_dropout(job: StageJob, args: Any, model: torch.nn.Module, *, reference: bool) -> None:
    """Do what `disable_dropout` says, for every rate of the model: TRL switches off `nn.Dropout` alone, and some
    attention keeps its rate elsewhere. That the adapter's own dropout is off is said.

    Args:
        reference: the stage compares with a frozen reference. It shares the policy's modules, so dropout would reach it
            as well: then the rates have to be off.

    Raises:
        UserError: `disable_dropout: false` in such a stage, and something would be dropped.
    """
    rate = dropout_rate(model)
    if not rate:
        return
    if args.disable_dropout:
        if job.lora.dropout:
            logger.warning("%s: lora.dropout %g is off here (disable_dropout)", job.name, job.lora.dropout)
        no_dropout(model)
    elif reference:
        raise UserError(
            f"stages.{job.name}.train.disable_dropout",
            f"false, and the model drops at a rate of {rate:g}: its reference would be noisy, and no longer its start",
            "leave it out (dropout is off in this stage)",
        )


@contextmanager
def _in_full_precision(model: nn.Module) -> Generator[None]:
    """Within it TRL builds a trainer. On a quantised base it rounds what trains to bfloat16, in which a step smaller
    than 1/256 of a weight is lost, and a policy is no longer its parent's copy; afterwards what was there is there
    again, in fp32."""
    held = {name: each.data for name, each in model.named_parameters() if each.requires_grad}
    yield
    for name, each in model.named_parameters():
        if name in held and each.dtype != held[name].dtype:
            each.data = held[name].to(each.device)


@contextmanager
def _without_rename_warnings() -> Generator[None]:
    """transformers renamed gradient checkpointing; TRL still reads the old name, which is nothing a user can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def _epochs(trainer: Trainer) -> float:
    """How often the rows were gone through. Transformers counts micro-batches, of which an epoch's last step may have
    fewer; here a step counts as one, however it is split."""
    loader: Any = trainer.callback_handler.train_dataloader
    steps = math.ceil(len(loader) / trainer.args.gradient_accumulation_steps)
    return trainer.state.global_step / max(steps, 1)


def _evaluated_last(trainer: Trainer) -> bool:
    """Whether the weights at hand were evaluated last: never after the best checkpoint was loaded back."""
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(steps) and steps[-1] == trainer.state.global_step and not trainer.args.load_best_model_at_end
