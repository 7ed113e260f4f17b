"""PPO with a KL penalty: the policy, its value, its reference and its reward are adapters on one frozen base.

An iteration reads top to bottom in `PPOTrainer._iteration`: sample prompts, generate, score, KL, advantages (steps 1 to
5, `ppo_collect.py`), then the minibatch epochs (step 6, `ppo_update.py`, with the losses in `losses.py`). Who is who on
the base is said in `ppo_roles.py`; how a run begins, saves, resumes and ends in `ppo_run.py`. Sources: Ouyang et al.
2022 (arXiv 2203.02155), Huang et al. 2024 (arXiv 2403.17031).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..models.adapters import AdapterSet, LoraSpec
from .kl_control import kl_controller
from .ppo_checkpoint import LoopState
from .ppo_collect import Collector
from .ppo_config import PPOConfig
from .ppo_forward import Trunk, dropout_off
from .ppo_metrics import add_report, check_ratio, check_reference, tolerance, update_metrics
from .ppo_models import open_policy, reward_sources
from .ppo_prompts import Prompts, seed_of
from .ppo_roles import add_reference, add_value, trainable_parameters, value_start
from .ppo_run import PPORun
from .ppo_samples import SampleLog
from .ppo_update import Updater, minibatches
from .rewards import RewardSource
from .rollout import FORWARD_ONLY, Rollout
from .scorers import build_scorers

__all__ = ["PPOConfig", "PPOTrainer"]

RewardFunc = str | Callable[..., list[float]]


class PPOTrainer(PPORun):
    """PPO on adapters.

    One optimiser step is one minibatch and counts as one `global_step`. Where the epochs of an iteration stop early,
    its remaining steps pass without an update, so that schedule, saving and progress keep their places.

    Args:
        model: what answers: an `AdapterSet`, a `PeftModel` with one LoRA adapter, a plain causal model, or a string: a
            stage's folder, a hub id or another base spec.
        args: the settings.
        processing_class: the tokenizer; may be left out when `model` is a string.
        train_dataset: rows with `prompt` (text, or messages) or `prompt_ids`; the other columns go to reward functions.
        reward_funcs: one or several functions with TRL's signature `f(prompts, completions, **columns)`, or names:
            "module:function", or a sequence-classification model.
        reward_adapter: folder of a reward stage on the same base.
        rewards: the same as `RewardSource` objects, with weights.
        callbacks, optimizers: as in `transformers.Trainer`.
        lora: the new adapter's settings, when `model` has none. `peft_config` (a PEFT `LoraConfig`) says the same.
        quiet: leave out the Trainer's own printing of logs and progress.

    Raises:
        UserError: no reward, or data, models or adapters that do not fit.
    """

    def __init__(
        self,
        model: AdapterSet | PeftModel | PreTrainedModel | str,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        *,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        reward_adapter: str | Path | None = None,
        rewards: Sequence[RewardSource] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        lora: LoraSpec | None = None,
        peft_config: LoraConfig | None = None,
        quiet: bool = False,
    ) -> None:
        args = PPOConfig("ppo_output") if args is None else args
        sources = reward_sources(reward_funcs, reward_adapter, rewards)
        self.adapters, tokenizer = open_policy(model, processing_class, lora, peft_config)
        prompts = Prompts.of(train_dataset if train_dataset is not None else (), tokenizer)
        super().__init__(
            model=self.adapters.model,
            args=args,
            train_dataset=train_dataset,
            processing_class=tokenizer,
            data_collator=_no_collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: PPOConfig = args
        if quiet:
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)
        self.check_launch()
        self.trunk = Trunk(self.adapters, args.temperature, self.autocast)
        self._build_roles(sources, tokenizer, prompts)
        self.loop = LoopState(kl_coef=args.kl_coef, world_size=args.world_size)
        self.rollout: Rollout | None = None
        self.session_episodes, self.session_tokens = 0, 0.0

    def _build_roles(self, sources: list[RewardSource], tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
        """The frozen reference and rewards, the value, and what works with them."""
        args, adapters = self.args, self.adapters
        self.own_reference = add_reference(adapters)
        scorers = build_scorers(
            sources,
            self.trunk,
            tokenizer,
            device=args.device,
            batch_size=FORWARD_ONLY * args.per_device_train_batch_size,
        )
        start = value_start(
            sources,
            scorers,
            centre=args.normalize_rewards,
            rescale=args.reward_scale == "std",
            weighted=args.reward_combination == "sum",
        )
        add_value(adapters, shared=args.value == "shared", start=start)
        for head in adapters.heads.values():
            head.to(args.device)
        dropout_off(adapters.model)
        adapters.model.train(bool(args.activation_checkpointing))
        policy, value = trainable_parameters(adapters, shared=args.value == "shared")
        self.trainables = {f"policy.{i}": p for i, p in enumerate(policy)}
        self.trainables |= {f"value.{i}": p for i, p in enumerate(value)}
        self.share_start()
        self.updater = Updater(args, self.trunk, policy, value, self.reduce)
        self.collector = Collector(
            args, self.trunk, tokenizer, prompts, sources, scorers=scorers, device=args.device, reduce=self.reduce
        )
        self.samples = SampleLog(
            Path(args.samples_file or Path(str(args.output_dir)) / "rollouts.jsonl"),
            every=args.log_samples_every if self.is_world_process_zero() else 0,
        )

    def _inner_training_loop(self, *_: Any, **kwargs: Any) -> TrainOutput:
        args = self.args
        iterations = args.num_iterations(len(self.collector.prompts))
        self.begin(iterations * args.steps_per_iteration(), kwargs.get("resume_from_checkpoint"))
        loop, began, first = self.loop, time.time(), self.loop.iteration
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        self.samples.start(loop.iteration + (self.rollout is not None))
        while loop.iteration < iterations and not self.control.should_training_stop:
            self._iteration()
        return self.end(began, (loop.iteration - first) * args.rollout_batch_size)

    def _iteration(self) -> None:
        """One iteration, or the rest of one that a checkpoint interrupted."""
        args, loop = self.args, self.loop

        # 1-5. Prompts, generation, scores, KL, advantages.
        if self.rollout is None:
            self.rollout = self._collect()

        # 6. Minibatch epochs, a fresh shuffle each.
        for slot in range(loop.slot, args.steps_per_iteration()):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            if not loop.stopped:
                self._minibatch(self.rollout, slot)
            loop.totals["lr"] = self.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
            self.lr_scheduler.step()  # type: ignore[union-attr]
            loop.slot = slot + 1
            self.state.global_step += 1
            self.state.epoch = self._epochs_done()
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            loop.log_due |= self.control.should_log
            if loop.slot == args.steps_per_iteration():
                self._finish_iteration()
                self.keep_policy()
            if self.control.should_save:
                self._save_checkpoint(self.model, None)
                self.control = self.callback_handler.on_save(args, self.state, self.control)
            if self.control.should_training_stop:
                break

    def _collect(self) -> Rollout:
        """A fresh rollout; the loop stands before its first minibatch."""
        args, loop = self.args, self.loop
        collected = self.collector.collect(loop.iteration, loop.kl_coef)
        loop.metrics, loop.totals = collected.metrics, {}
        loop.slot, loop.stopped, loop.log_due = 0, False, False
        self.session_episodes += args.rollout_batch_size
        self.session_tokens += loop.metrics["rollout/length"] * args.rollout_batch_size
        if loop.iteration == 0 and self.own_reference:
            check_reference(collected.rollout, self._tolerance())
            self.own_reference = False  # a second `train` starts where the first one ended
        self.samples.write(loop.iteration, collected.samples)
        return collected.rollout

    def _minibatch(self, rollout: Rollout, slot: int) -> None:
        """One optimiser step, unless a brake says no."""
        args, loop = self.args, self.loop
        began = time.perf_counter()
        epoch, place = divmod(slot, args.num_mini_batches)
        seed = seed_of(args.seed, "minibatches", loop.iteration, epoch, args.process_index)
        rows = minibatches(len(rollout.episodes), args.num_mini_batches, seed, args.device)[place]
        report = self.updater.gradients(rollout, rows, loop.kl_coef)
        if slot == 0:
            check_ratio(report, loop.iteration, self._tolerance())
        loop.stopped = report.stop
        if not (report.stop or report.skip):
            self.control = self.callback_handler.on_pre_optimizer_step(args, self.state, self.control)
            self.optimizer.step()  # type: ignore[union-attr]
            self.control = self.callback_handler.on_optimizer_step(args, self.state, self.control)
        for parameter in self.trainables.values():
            parameter.grad = None
        add_report(loop.totals, report, time.perf_counter() - began)

    def _finish_iteration(self) -> None:
        """Adapt the KL coefficient, log, and stand at the start of the next iteration."""
        args, loop = self.args, self.loop
        before = int(loop.iteration * args.rollout_batch_size / len(self.collector.prompts))
        controller = kl_controller(loop.kl_coef, args.kl_target, args.kl_horizon)
        controller.update(loop.metrics["objective/kl"], args.rollout_batch_size)
        loop.kl_coef = controller.value
        loop.iteration, loop.slot, self.rollout = loop.iteration + 1, 0, None
        if int(self._epochs_done()) > before:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            loop.log_due |= self.control.should_log
        if loop.log_due:
            found = loop.metrics | update_metrics(loop.totals, kl_in_loss=args.kl_in == "loss")
            self.log({**found, "episode": loop.iteration * args.rollout_batch_size})

    def _tolerance(self) -> float:
        return tolerance(self.trunk.head.weight.dtype, autocast=self.args.bf16 or self.args.fp16)

    def _epochs_done(self) -> float:
        """Passes over the prompts, the part of the iteration under way included."""
        parts = self.loop.iteration + self.loop.slot / self.args.steps_per_iteration()
        return parts * self.args.rollout_batch_size / len(self.collector.prompts)


def _no_collator(rows: list[Any]) -> Any:
    """Never called: prompts are kept as lists of ids, and padded nowhere but in the rollout."""
    return rows
