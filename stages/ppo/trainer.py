"""The on-policy loop: policy, reference, reward and what else a method needs are adapters on one frozen base.

An iteration reads top to bottom in `OnPolicyTrainer._iteration`: sample prompts, generate, score, KL, advantages,
minibatch epochs. What makes it PPO (the value, the advantages, the losses) is handed in by `PPOTrainer` (`method.py`),
and what makes it GRPO, RLOO or distillation by the trainers of `grpo.py`, `rloo.py` and `distill.py`.
Sources: Ouyang et al. 2022 (arXiv 2203.02155), Huang et al. 2024 (arXiv 2403.17031).
"""

import inspect
import logging
import random
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import broadcast
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import IntervalStrategy, TrainOutput, speed_metrics

from ... import stopping
from ...errors import Lost, UserError
from ...models import seams
from ...models.adapters import DEFAULT, REF, AdapterSet
from ...models.devices import say_unused_gpus
from ...models.dropout import no_dropout
from ...models.lora import LoraSpec
from ...models.memory import release_free_memory
from ...models.older import save_tokenizer
from ...models.pickles import check_pickles
from ...models.starts import check_decay
from ...models.tokens import check_vocabulary
from ..callbacks import Clock, ProgressBar
from ..checkpoints import Progress, Resumable, checkpoints, continuing, log_bytes, newest, read_progress
from ..finite import Skips, not_finite
from ..losses import token_rewards
from ..options import one_device
from ..processes import Processes
from ..scorers.asked_once import SERVERS
from ..serving.own import LOG
from ..serving.place import place_of
from .config import OnPolicyConfig, PPOConfig, RewardedConfig
from .evaluation import HeldOut
from .files import (
    POLICIES,
    LoopState,
    SampleLog,
    forget_policies,
    keep_policy,
    load_rollout,
    load_state,
    load_trainables,
    save_state,
    save_tensors,
)
from .method import PPO, Forwards, Method, value_start
from .network import Trunk, add_reference
from .off_policy import STALENESS, corrected
from .opening import open_policy, reward_sources
from .reply_scores import ScoreRules
from .rewards import Responses, RewardFunc, RewardSource, RunningScale, Scorer, Scoring, build_scorers
from .rollout import (
    SAMPLED,
    SCORED,
    Episodes,
    Prompts,
    Rollout,
    decode,
    generate,
    rollout_metrics,
    sample_rows,
    seed_of,
    stream_rows,
)
from .served import SERVED, ServedPolicy, open_served
from .shared import gathered, own_share
from .trl_names import refuse_names, trainer_names
from .update import (
    FULL_TOLERANCE,
    Updater,
    add_report,
    check_ratio,
    check_reference,
    check_sampler,
    minibatches,
    sampler_tolerance,
    tolerance,
    update_metrics,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fresh:
    """What is logged of a fresh rollout of this process besides itself: B replies of at most R tokens.

    texts: of the replies. non_score_BR: the KL's part of the rewards, a token each. seconds: by what they went to.
    drawing: seconds in which the replies were drawn. weights: of what a server drew.
    """

    prompts: Prompts
    texts: list[str]
    non_score_BR: torch.Tensor
    seconds: dict[str, float]
    drawing: float
    weights: dict[str, float]


class OnPolicyTrainer(Resumable):
    """The loop of methods that learn from what their policy says; `build_method` hands the method in.

    One optimiser step is one minibatch and counts as one `global_step`. Where the epochs of an iteration stop early,
    its remaining steps pass without an update, so that schedule, saving and progress keep their places.

    Args:
        model: what answers: an `AdapterSet`, a `PeftModel` with one LoRA adapter, a plain causal model, or a string: a
            stage's folder, a hub id or another base spec.
        reward_funcs: one or several functions with TRL's signature `f(prompts, completions, **columns)`, or names:
            "module:function", or a sequence-classification model.
        args: the settings.
        train_dataset: rows with `prompt` (text, or messages) or `prompt_ids`; the other columns go to reward functions.
        eval_dataset: rows of the same kind, never trained on: see `evaluate`.
        processing_class: the tokenizer; may be left out when `model` is a string.
        reward_adapter: folder of a reward stage on the same base.
        rewards: the same as `RewardSource` objects, with weights.
        callbacks, optimizers: as in `transformers.Trainer`.
        lora: the new adapter's settings, when `model` has none. `peft_config` (a PEFT `LoraConfig`) says the same.
        quiet: leave out the Trainer's own printing of logs and progress.

    Attributes:
        adapters: every role on the one base.
        method: what trains, and how.
        trainables: what a checkpoint holds, by name.
        held_out: the prompts of `eval_dataset`.
        loop, rollout: the place in the run, and the rollout in flight between two minibatches.
        episodes, tokens: drawn, and in them, since the run's first iteration.
        made_of: what the lineage of what comes out says of this trainer besides its config. sources: folders of
            adapters that went in besides the policy and the reward stages.

    Raises:
        UserError: no reward, or data, models or adapters that do not fit.
    """

    of_any_number = True
    rewarded = True
    """Whether responses get scores."""
    config: type[OnPolicyConfig] = PPOConfig
    order = "model, reward_funcs, args, train_dataset, eval_dataset, processing_class"
    """Of the arguments."""

    def __init__(
        self,
        model: AdapterSet | PeftModel | PreTrainedModel | str,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: OnPolicyConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        reward_adapter: str | Path | None = None,
        rewards: Sequence[RewardSource] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        lora: LoraSpec | None = None,
        peft_config: LoraConfig | None = None,
        quiet: bool = False,
        **others: object,
    ) -> None:
        _refuse_others(type(self), model, reward_funcs, args, others)
        for seam in (seams.TRAINER_CHECKPOINT, seams.TRAINER_RESUME):
            seams.require(seam, type(self))
        name = type(self).__name__
        args = self.config(f"{self.config.method.lower()}_output") if args is None else args
        sources = reward_sources(reward_funcs, reward_adapter, rewards, name) if self.rewarded else []
        self.made_of: dict[str, Any] = {}
        self.sources: tuple[Path, ...] = ()
        self.adapters, self.tokenizer = open_policy(model, processing_class, lora, peft_config, name)
        self.prompts = self._prompts(train_dataset if train_dataset is not None else (), "train_dataset")
        self.held_out = None if eval_dataset is None else self._prompts(eval_dataset, "eval_dataset")
        if self.held_out is None and args.eval_strategy != "no":
            said = f"eval_strategy is {str(IntervalStrategy(args.eval_strategy).value)!r}, and no eval_dataset is given"
            raise UserError(type(self).__name__, said, "give prompts to evaluate on, or leave eval_strategy out")
        super().__init__(
            model=self.adapters.model,
            args=one_device(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.tokenizer,
            data_collator=_no_collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: OnPolicyConfig = args
        if quiet:
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)
        self._check_launch()
        self._build_roles(sources)
        self.loop = LoopState(kl_coef=args.kl_control().value)
        self.rollout: Rollout | None = None
        self.fresh: Fresh | None = None  # of a rollout whose first step measures the old policy's log-probs
        self.episodes, self.tokens = 0, 0.0
        self.evaluate_seconds = 0.0
        self.skips = Skips()

    def _prompts(self, dataset: Any, where: str) -> Prompts:
        if isinstance(dataset, Mapping):
            said = f"is {type(dataset).__name__} of several datasets, expected one"
            raise UserError(where, said, "give one, with a column that tells the rows apart")
        prompts = Prompts.of(dataset, self.tokenizer, where)
        size = self.adapters.causal.config.get_text_config().vocab_size
        check_vocabulary(prompts.ids, self.tokenizer, size, where)
        return prompts

    def build_method(self, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> Method:
        """What trains, the advantage estimator and the loss; called once, with reference and rewards in place."""
        raise NotImplementedError

    def _build_roles(self, sources: list[RewardSource]) -> None:
        """The frozen reference and rewards, the method's own roles, and what works with them."""
        args, adapters = self.args, self.adapters
        self.trunk = Trunk(adapters, args.temperature, self._autocast)
        logger.info("forwards without gradients hold up to %d tokens", self.trunk.forward_tokens)
        self.served, self.under_way = self._open_server(), False
        self.own_reference = args.measures_kl() and add_reference(adapters)
        scorers = build_scorers(
            sources,
            self.trunk,
            self.tokenizer,
            device=args.device,
            these=Processes.all() if args.world_size > 1 and any(each.kind in SERVERS for each in sources) else None,
        )
        self.scoring = Scoring(
            args if isinstance(args, RewardedConfig) else ScoreRules(), sources, scorers, self.reduce
        )
        self.method = self.build_method(sources, scorers)
        self.trainables = self.method.trainables
        for head in adapters.heads.values():
            head.to(args.device)
        no_dropout(adapters.model)
        adapters.model.train(bool(args.activation_checkpointing))
        self._share_start()
        self._complete_optimizer()
        self.updater = Updater(args, self.method, self.reduce)
        self.samples = SampleLog(
            Path(args.samples_file or Path(str(args.output_dir)) / "rollouts.jsonl"),
            every=args.log_samples_every if self.is_world_process_zero() else 0,
        )

    def _open_server(self) -> ServedPolicy | None:
        """The server that draws, held against this stage's base before anything trains; None where none is asked."""
        args, prompts = self.args, [*self.prompts.ids, *(() if self.held_out is None else self.held_out.ids)]
        place = place_of(args, args.rollout_place)
        if place is None:
            return None
        these = Processes.all() if args.world_size > 1 else Processes()
        trunk = Trunk(self.adapters, 1.0, self._autocast)
        output = Path(str(args.output_dir))
        folder = Path(args.rollout_folder or output / SERVED)
        return open_served(place, trunk, self.tokenizer, prompts, args, folder, output / LOG, these)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the start or exactly where a checkpoint left off (True: the newest complete one)."""
        if resume_from_checkpoint is True:
            found = newest(Path(str(self.args.output_dir)), "resuming", None)
            if found is None:
                raise UserError(str(self.args.output_dir), "it holds no complete checkpoint", "start without resuming")
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *_: object, **kwargs: Any) -> TrainOutput:
        args = self.args
        iterations = args.num_rollouts(len(self.prompts))
        self._begin(iterations * args.steps_per_iteration(), kwargs.get("resume_from_checkpoint"))
        loop, began = self.loop, time.time()
        before = sum(each.seconds for each in self.callback_handler.callbacks if isinstance(each, Clock))
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        self.samples.start(loop.iteration + (self.rollout is not None))
        if args.eval_on_start and args.eval_strategy != "no" and self.state.global_step == 0:
            self.evaluate()
        self.under_way = True
        try:
            self._take_up_draw(kwargs.get("resume_from_checkpoint"))
            while loop.iteration < iterations and not self.control.should_training_stop:
                self._iteration()
            if self.served is not None:
                self.served.close()
        finally:
            self.under_way = False
            if self.served is not None:
                self.served.stop()
        return self._end(began - before, loop.iteration * args.rollout_batch_size)

    def _iteration(self) -> None:
        """One iteration, or the rest of one that a checkpoint interrupted."""
        if self.rollout is None:
            self.rollout = self._draw()
        # 6. Minibatch epochs, a fresh shuffle each.
        self._minibatch_epochs(self.rollout)

    @contextmanager
    def _left_off(self) -> Generator[None]:
        """Generation takes long and leaves nothing behind: asked to stop, one process does not wait for its end. A run
        that loses the server which draws goes on from here."""
        own = continuing(self)
        if self.args.world_size > 1 or own is None:
            yield
            return
        torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
        try:
            with stopping.interruptible():
                yield
        except (stopping.Stopped, Lost) as stopped:
            torch.set_rng_state(torch_state)
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
            if isinstance(stopped, Lost):
                if own.plan is not None and self.state.global_step > 0:
                    self._save_checkpoint(self.adapters.model, None)
                raise
            own.stop, own.own = stopped.number, True
            if own.plan is None or self.state.global_step == 0:
                raise own.stopped(self.state, "without a checkpoint: it starts anew") from None
            self._save_checkpoint(self.adapters.model, None)
            raise own.stopped(self.state, "with a checkpoint") from None

    def _draw(self) -> Rollout:
        """Sample, score and measure the iteration's rollout."""
        args, loop = self.args, self.loop
        began = time.perf_counter()

        # 1. Prompts: this process' slice of the iteration's part of the stream.
        prompts = self._prompts_at(loop.iteration)

        # 2. Generate.
        episodes = self._respond(prompts)
        generated = time.perf_counter()

        # 3. Score.
        texts = decode(self.tokenizer, episodes.responses())
        scores = self.scoring.scores(Responses(episodes, prompts.prompts, texts, prompts.column_lists(), prompts.rows))
        scored = time.perf_counter()

        # 4. Log-probs of old policy and reference; the KL penalty goes into the rewards, token by token.
        later = args.first_step_measures()
        forwards = self._forwards(episodes)
        release_free_memory()
        logps_BR, ref_logps_BR = forwards.logps_BR, forwards.ref_logps_BR
        delta_BR = torch.zeros_like(logps_BR) if later or ref_logps_BR is None else logps_BR - ref_logps_BR
        coef = loop.kl_coef if args.kl_in_reward else 0.0
        rewards_BR, non_score_BR = token_rewards(delta_BR, scores.total_B, episodes.mask_BR, coef)

        # 5. Advantages; where a server drew, weighed by how far its log-probs are from these.
        rollout = self.method.rollout(episodes, forwards, rewards_BR, scores)
        weights: dict[str, float] = {}
        if self.served is not None and self.speaks():
            rollout, weights = corrected(rollout, args, self.reduce)

        times = {"rollout": generated - began, "score": scored - generated, "forward": time.perf_counter() - scored}
        drawing = times["rollout"]
        if self.served is not None and args.rollout_ahead:
            drawing, weights[STALENESS] = self.served.seconds, float(self.served.staleness)
        loop.totals, loop.slot, loop.stopped, loop.log_due, loop.eval_due = {}, 0, False, False, False
        fresh = Fresh(prompts, texts, non_score_BR, times, drawing, weights)
        if later:
            self.fresh = fresh
        else:
            self._log_rollout(rollout, fresh, forwards.entropy_BR)
        return gathered(rollout)

    def speaks(self) -> bool:
        """Whether the responses of the iteration under way are the policy's own."""
        return True

    def _respond(self, prompts: Prompts) -> Episodes:
        """A response to each prompt of this process. The seed names the iteration, and a row's place in it its stream,
        whichever process draws it."""
        args, served, iteration, step = self.args, self.served, self.loop.iteration, self.state.global_step
        further = self.under_way and args.rollout_ahead > 0 and iteration + 1 < args.num_rollouts(len(self.prompts))
        with self._left_off():
            if served is None or not served.awaited:
                given = {**self._draw_of(iteration), "device": args.device, "on_batch": self._drawn}
                episodes = self._answer(prompts, args, **given)
            else:
                episodes = served.take(prompts, step=step, device=args.device, on_batch=self._drawn)
            if served is not None and further:
                served.put(step)
        # not before nothing can be left off any more: from here on a checkpoint keeps who draws the next replies
        if served is not None and further:
            served.start(self._prompts_at(iteration + 1), args, **self._draw_of(iteration + 1))
        elif served is not None:
            served.rest()
        return episodes

    def _prompts_at(self, iteration: int) -> Prompts:
        """This process' prompts of an iteration."""
        args, group = self.args, self.method.samples_per_prompt
        local = args.local_rollout_size()
        start = iteration * args.rollout_batch_size + args.process_index * local
        rows = stream_rows(len(self.prompts), args.seed, start // group, local // group)
        return self.prompts.take([row for row in rows for _ in range(group)])

    def _draw_of(self, iteration: int) -> dict[str, int]:
        """Which random streams its replies are drawn from."""
        first = self.args.process_index * self.args.local_rollout_size()
        return {"seed": seed_of(self.args.seed, "rollout", iteration, 0), "first": first}

    def _take_up_draw(self, checkpoint: str | None) -> None:
        """Have the replies drawn again that were drawn ahead when a checkpoint was written, by who drew them."""
        args, served, iteration = self.args, self.served, self.loop.iteration + (self.rollout is not None)
        if served is None:
            return
        served.rest()
        if checkpoint is None or not args.rollout_ahead or not 0 < iteration < args.num_rollouts(len(self.prompts)):
            return
        with self._left_off():
            found = served.restore(Path(checkpoint))
        if found:
            served.start(self._prompts_at(iteration), args, **self._draw_of(iteration))
            return
        said = "%s does not say which policy draws ahead: the replies of iteration %d are drawn by the policy as it is"
        logger.warning(said, checkpoint, iteration)

    def _answer(self, prompts: Prompts, config: OnPolicyConfig, **asked: Any) -> Episodes:
        """A response to each prompt: by this process, or by a server. See `rollout.generate`."""
        if self.served is None:
            return generate(self.adapters, self.tokenizer, prompts, config, **asked)
        return self.served.generate(prompts, config, step=self.state.global_step, **asked)

    def _forwards(self, episodes: Episodes) -> Forwards:
        """Those of a fresh rollout, without what its first step measures."""
        return self.method.forwards(episodes)

    def _drawn(self, done: int) -> None:
        """Show it."""
        for each in self.callback_handler.callbacks:
            if isinstance(each, ProgressBar):
                each.drawing(self.state.global_step, done, self.args.local_rollout_size())

    def _log_rollout(self, rollout: Rollout, fresh: Fresh, entropy_BR: torch.Tensor) -> None:
        """Measure this process' fresh rollout and write some of it, before anything is learned from it."""
        args, loop = self.args, self.loop
        metrics = rollout_metrics(rollout, fresh.non_score_BR, entropy_BR, self.reduce, args.rollout_batch_size)
        metrics |= self.method.rollout_metrics(rollout) | fresh.weights
        if self.scoring.scorers:
            metrics["objective/kl_coef"] = loop.kl_coef
        tokens = metrics["rollout/length"] * args.rollout_batch_size
        read = self.reduce(rollout.episodes.start_B.sum().double(), "sum")
        self.state.num_input_tokens_seen += round(float(read) + tokens)
        metrics["num_tokens"] = float(self.state.num_input_tokens_seen)
        metrics["rollout/tokens_per_second"] = tokens / fresh.drawing
        metrics |= {f"time/{name}": spent for name, spent in fresh.seconds.items()}
        for name in (*(() if self.scoring.scorers else SCORED), *(() if self.speaks() else SAMPLED)):
            metrics.pop(name, None)
        loop.metrics = metrics
        self.episodes += args.rollout_batch_size
        self.tokens += tokens
        # a server computes in 16 bits, whatever the training does
        asked, low = args.mismatch_tolerance, self._tolerance() != FULL_TOLERANCE or self.served is not None
        # of an older policy the differences are its updates, which are for who trains to bound
        if self.speaks() and (asked is not None or not metrics.get(STALENESS)):
            check_sampler(metrics, loop.iteration, sampler_tolerance(asked, low_precision=low))
        if loop.iteration == 0 and self.own_reference:
            check_reference(rollout, self._tolerance())
            self.own_reference = False  # a second `train` starts where the first one ended
        samples = sample_rows(fresh.prompts, fresh.texts, rollout, args.num_log_samples)
        for row in () if self.scoring.scorers else samples:
            del row["score"]
        self.samples.write(loop.iteration, samples)

    def _minibatch_epochs(self, rollout: Rollout) -> None:
        """The optimiser steps that the iteration still has to make."""
        args, loop = self.args, self.loop
        assert self.optimizer is not None and self.lr_scheduler is not None
        for slot in range(loop.slot, args.steps_per_iteration()):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            if not loop.stopped:
                self._minibatch(rollout, slot)
            loop.totals["lr"] = self.optimizer.param_groups[0]["lr"]
            self.lr_scheduler.step()
            loop.slot = slot + 1
            self.state.global_step += 1
            self.state.epoch = self._epochs_done()
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            loop.log_due |= self.control.should_log
            loop.eval_due |= self.control.should_evaluate
            if loop.slot == args.steps_per_iteration():
                self._finish_iteration()
                self._keep_policy()
            if self.control.should_save:
                self._save_checkpoint(self.adapters.model, None)
                self.control = self.callback_handler.on_save(args, self.state, self.control)
            if self.control.should_training_stop:
                break

    def _minibatch(self, rollout: Rollout, slot: int) -> None:
        """One optimiser step, unless a brake says no."""
        args, loop = self.args, self.loop
        began = time.perf_counter()
        epoch, place = divmod(slot, args.num_mini_batches)
        seed = seed_of(args.seed, "minibatches", loop.iteration, epoch, 0)
        group = self.method.samples_per_prompt
        rows = minibatches(len(rollout.episodes), args.num_mini_batches, seed, group)[place]
        rows = own_share(rows, rollout, args.process_index, args.world_size, group)
        fresh, self.fresh = self.fresh, None
        report = self.updater.gradients(rollout, rows, loop.kl_coef, measures=fresh is not None)
        if fresh is not None:
            assert rollout.entropy_BR is not None
            own = rollout if args.world_size == 1 else rollout.rows(self._local_rows())
            assert own.entropy_BR is not None
            self._log_rollout(own, fresh, own.entropy_BR)
        if not report.finite and not self.skips.take():
            which = f"minibatch {slot + 1} of iteration {loop.iteration + 1} (prompts {self._prompts_of(rows)})"
            worst = max(report.norms.values())
            kept = checkpoints(Path(str(args.output_dir)))
            good = str(kept[-1][1]) if kept else None
            step = self.state.global_step + 1
            raise not_finite(args.method, step, "the gradient's norm", worst, which, skips=self.skips, good=good)
        if slot == 0 and report.finite:
            check_ratio(report, loop.iteration, self._tolerance())
        loop.stopped = report.stop
        assert self.optimizer is not None
        if report.skip:
            for parameter in self.trainables.values():
                parameter.grad = None
            self.optimizer.step()  # passes by what has no gradient; the schedule wants to have seen it
        elif not report.stop:
            self.control = self.callback_handler.on_pre_optimizer_step(args, self.state, self.control)
            self.optimizer.step()
            self.control = self.callback_handler.on_optimizer_step(args, self.state, self.control)
        for parameter in self.trainables.values():
            parameter.grad = None
        add_report(loop.totals, report, time.perf_counter() - began)

    def _local_rows(self) -> torch.Tensor:
        """Which rows of the gathered rollout this process drew."""
        local = self.args.local_rollout_size()
        return torch.arange(local) + self.args.process_index * local

    def _prompts_of(self, rows: torch.Tensor) -> str:
        """The prompts of some episodes, by their places in the data, for a message."""
        args, group = self.args, self.method.samples_per_prompt
        start = self.loop.iteration * args.rollout_batch_size
        places = [(start + row) // group for row in rows[:3].tolist()]
        shown = [stream_rows(len(self.prompts), args.seed, place, 1)[0] + 1 for place in places]
        return ", ".join(map(str, shown)) + (", ..." if len(rows) > len(shown) else "")

    def _finish_iteration(self) -> None:
        """Adapt the KL coefficient, log, and stand at the start of the next iteration."""
        args, loop = self.args, self.loop
        before = int(loop.iteration * args.prompts_per_rollout() / len(self.prompts))
        controller = args.kl_control(loop.kl_coef)
        controller.update(loop.metrics.get("objective/kl", 0.0), args.rollout_batch_size)
        loop.kl_coef = controller.value
        loop.iteration, loop.slot, self.rollout = loop.iteration + 1, 0, None
        if int(self._epochs_done()) > before:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            loop.log_due |= self.control.should_log
            loop.eval_due |= self.control.should_evaluate
        if loop.log_due:
            found = loop.metrics | update_metrics(loop.totals, self.method)
            spent = sum(found[f"time/{part}"] for part in ("rollout", "score", "forward", "update"))
            found["step_time"] = spent / loop.totals["steps"]
            self.log({**found, **self.skips.said(), "episode": loop.iteration * args.rollout_batch_size})
        if loop.eval_due:
            self.evaluate()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """One response of the policy, as it is now, to each held-out prompt: what it scores, and how far it has gone.

        Args:
            eval_dataset: other prompts than those that the trainer was made with.

        Returns:
            Means over the prompts, as logged: `eval_objective/scores`, `eval_objective/scores_std`,
            `eval_objective/kl` in nats a response, `eval_objective/rlhf_reward`, `eval_rollout/length` in tokens,
            `eval_rollout/eos_rate`, `eval_runtime` in seconds; without rewards none of their names.

        Raises:
            UserError: there are no such prompts.
        """
        del ignore_keys
        prompts = self.held_out if eval_dataset is None else self._prompts(eval_dataset, "eval_dataset")
        if prompts is None:
            raise UserError(f"{type(self).__name__}.evaluate", "no eval_dataset is given", "give prompts to answer")
        began = time.perf_counter()
        held = HeldOut(
            prompts, self.adapters, self.tokenizer, self.scoring, self.method, self.reduce, self.measured, self._answer
        )
        found = held.measure(self.args, self.loop.kl_coef)
        if self.served is not None and not self.under_way:
            self.served.close()  # nobody asks it for more
        release_free_memory()
        seconds = time.perf_counter() - began
        self.evaluate_seconds += seconds
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in (found | {"runtime": seconds}).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, episodes: Episodes) -> dict[str, torch.Tensor]:
        """What an evaluation measures besides, summed over each response's tokens [B]: it is logged a token."""
        del episodes
        return {}

    def _tolerance(self) -> float:
        return tolerance(self.trunk.head.weight.dtype, autocast=self.args.bf16 or self.args.fp16)

    def _epochs_done(self) -> float:
        """Passes over the prompts, the part of the iteration under way included."""
        parts = self.loop.iteration + self.loop.slot / self.args.steps_per_iteration()
        return parts * self.args.prompts_per_rollout() / len(self.prompts)

    # What processes share.

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """Over all processes: "sum" or "max"."""
        if self.args.world_size == 1:
            return tensor
        largest = how == "max"
        found = self.accelerator.gather(tensor.reshape(1)) if largest else self.accelerator.reduce(tensor, "sum")
        assert isinstance(found, torch.Tensor)
        return found.max() if largest else found

    def _check_launch(self) -> None:
        """Refuse engines that would take over what trains.

        Raises:
            UserError: DeepSpeed or FSDP.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "accelerate launch",
                f"DeepSpeed or FSDP is to divide what trains, but {self.args.method} keeps whole adapters and an "
                "optimiser of its own",
                "launch with distributed_type MULTI_GPU or MULTI_CPU, or use preftune run --launch fsdp2",
            )
        say_unused_gpus()

    def _autocast(self) -> AbstractContextManager[None]:
        """The context of a forward: mixed precision where the settings ask for it."""
        return self.accelerator.autocast()

    def _share_start(self) -> None:
        """Every process takes the first one's policy, value and reference, as DistributedDataParallel would have it.

        LoRA's random numbers may differ: a script need not set a seed before it makes its model.
        """
        if self.args.world_size == 1:
            return
        with torch.no_grad():
            frozen = self.adapters.parameters(REF) if self.args.measures_kl() else []
            for parameter in (*self.trainables.values(), *frozen):
                first = broadcast(parameter.detach())
                assert isinstance(first, torch.Tensor)
                parameter.copy_(first)

    # How a run begins, resumes, saves and ends: what `transformers.Trainer` would do in its own loop.

    def _begin(self, max_steps: int, resume: str | None) -> None:
        """Fresh state, optimiser and schedule, or those of the checkpoint `resume`."""
        args = self.args
        self.state = TrainerState(
            stateful_callbacks=[  # pyright: ignore[reportArgumentType]: declared as TrainerCallback, which `control` is not
                each for each in [*self.callback_handler.callbacks, self.control] if isinstance(each, ExportableState)
            ]
        )
        self.rollout = None
        self.episodes, self.tokens, self.evaluate_seconds = 0, 0.0, 0.0
        if self._created_lr_scheduler:  # by an earlier `train`, so not handed in by the caller
            self.optimizer = self.lr_scheduler = None
        self.loop = LoopState(kl_coef=args.kl_control().value)
        if resume is not None:
            check_pickles(Path(resume))
            self.state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
            self._load_callback_state()
            self.loop = load_state(Path(resume))
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.compute_steps(args, max_steps)
        self.state.init_training_references(self, max_steps, int(args.num_train_epochs), None)
        self.create_optimizer()
        self.create_scheduler(max_steps)
        self.scoring.running = RunningScale(*self.loop.running)
        if resume is not None:
            self._load_optimizer_and_scheduler(resume)
            self._load_scaler(resume)
            self._load_rng_state(resume)
            done = read_progress(Path(resume), args.process_index, args.world_size)
            self.episodes, self.tokens = int(done.more["episodes"]), done.tokens
            self.evaluate_seconds = done.evaluate_seconds
            self.skips.done, self.skips.logged = done.skipped, int(done.more["logged"])
            self.resumed = None
            if self.loop.slot:
                self.rollout = load_rollout(Path(resume), args.device)
        if args.keep_every and self.is_world_process_zero():
            # a resumed run passes the steps after its checkpoint once more
            forget_policies(self._policies(), after=self.state.global_step)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.control.should_training_stop = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimiser, with a group for each of the method's learning rates."""
        if self.optimizer is None:
            args = self.args
            check_decay(self.trainables.values(), args.weight_decay, f"{type(self).__name__}, weight_decay")
            cls, kwargs = self.get_optimizer_cls_and_kwargs(args, None)
            groups: list[dict[str, Any]] = [
                {"params": parameters, "lr": rate, "weight_decay": args.weight_decay}
                for parameters, rate in self.method.learning_rates()
            ]
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _complete_optimizer(self) -> None:
        """A caller's optimiser was made before the method had its own parameters (the value's): they join it here.

        Raises:
            UserError: it holds none of the policy's, or only some.
        """
        if self.optimizer is None:
            return
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        policy = self.adapters.parameters(DEFAULT)
        without = sum(id(parameter) not in held for parameter in policy)
        if without:
            raise UserError(
                f"{type(self).__name__}, optimizers",
                f"{without} of the policy's {len(policy)} weights are not in the optimizer, and would not train",
                "build it over every parameter of the model that requires a gradient, or leave it out",
            )
        for parameters, rate in self.method.learning_rates():
            missing = [parameter for parameter in parameters if id(parameter) not in held]
            if missing:
                logger.warning("%d weights of the value join your optimizer, at a rate of %g", len(missing), rate)
                self.optimizer.add_param_group({"params": missing, "lr": rate, "initial_lr": rate})

    def _keep_policy(self) -> None:
        """At the end of every `keep_every`-th iteration but the last, whose policy is the run's result."""
        args, state = self.args, self.state
        over = state.global_step >= state.max_steps or self.control.should_training_stop
        if args.keep_every and not over and self.loop.iteration % args.keep_every == 0 and self.is_world_process_zero():
            keep_policy(self.adapters, self._policies(), state.global_step)

    def _policies(self) -> Path:
        return Path(self.args.policies_dir or Path(str(self.args.output_dir)) / POLICIES)

    def _end(self, began: float, episodes: int) -> TrainOutput:
        """The last log entry and what `train` returns; `began` is a `time.time`."""
        tokens = self.loop.totals.get("tokens", 0.0)
        loss = self.loop.totals[self.method.statistics[0]] / tokens if tokens else 0.0
        metrics = speed_metrics("train", began, num_samples=episodes, num_steps=self.state.global_step)
        metrics["train_loss"] = loss
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, loss, metrics)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The policy as an ordinary PEFT adapter, with the tokenizer. The Trainer asks every process; one writes."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.adapters.save(DEFAULT, folder)
        save_tokenizer(self.tokenizer, folder)

    def progress(self) -> Progress:
        seconds = sum(each.spent() for each in self.callback_handler.callbacks if isinstance(each, Clock))
        return Progress(
            tokens=self.tokens,
            seconds=seconds,
            evaluate_seconds=self.evaluate_seconds,
            log_bytes=log_bytes(Path(str(self.args.output_dir)).parent),
            skipped=self.skips.done,
            more={"episodes": self.episodes, "logged": self.skips.logged},
        )

    def save_more(self, checkpoint: Path) -> None:
        save_tensors(checkpoint, self.trainables, self.rollout, self.args.process_index)
        if self.served is not None:
            self.served.keep(checkpoint)
        if self.args.should_save:
            self.loop.running = self.scoring.running.state()
            save_state(checkpoint, self.loop)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainables(Path(resume_from_checkpoint), self.trainables)


class PPOTrainer(OnPolicyTrainer):
    """PPO on adapters. Arguments, attributes and errors are those of `OnPolicyTrainer`."""

    args: PPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]: it is never set to another

    def build_method(self, sources: Sequence[RewardSource], scorers: Sequence[Scorer]) -> Method:
        """The clipped losses, and generalised advantages from a value that starts as the first reward stage."""
        return PPO(self.args, self.trunk, value_start(self.args, sources, scorers), self.reduce)


def _refuse_others(
    cls: type[OnPolicyTrainer], model: object, reward_funcs: object, args: object, others: dict[str, object]
) -> None:
    """Say what stands here in the place of other trainers' arguments.

    Raises:
        UserError: one of those, or a config where the model belongs.
    """
    known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "others")]
    refuse_names(cls.__name__, others, trainer_names(cls.config.__name__), known)
    wrong: list[tuple[str, object, str]] = []
    if isinstance(model, TrainingArguments):
        wrong.append(("model", model, "a model, or a string"))
    if isinstance(reward_funcs, TrainingArguments):
        wrong.append(("reward_funcs", reward_funcs, "functions or names"))
    if args is not None and not isinstance(args, cls.config):
        wrong.append(("args", args, f"a {cls.config.__name__}"))
    for name, value, wanted in wrong:
        remedy = f"the order is {cls.order}"
        raise UserError(cls.__name__, f"{name} is a {type(value).__name__}, expected {wanted}", remedy)


def _no_collator(rows: list[Any]) -> Any:
    """Never called: prompts are kept as lists of ids, and padded nowhere but in the rollout."""
    return rows
