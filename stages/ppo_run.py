"""What surrounds PPO's loop: how a run begins, resumes, saves and ends, and what its processes share.

`ppo.py` is the algorithm; this is everything else that `transformers.Trainer` would do in its own loop.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..errors import UserError
from ..models.adapters import REF, AdapterSet
from .ppo_checkpoint import (
    LoopState,
    last_complete,
    load_rollout,
    load_state,
    load_trainables,
    remove_older,
    reopen,
    save_state,
    save_tensors,
)
from .ppo_collect import Collector
from .ppo_config import PPOConfig
from .ppo_keep import POLICIES, forget_policies, keep_policy
from .ppo_update import Updater
from .rewards import RunningScale
from .rollout import Rollout


class PPORun(Trainer):
    """The Trainer under `PPOTrainer`.

    Attributes:
        adapters: every role on the one base.
        trainables: policy and value by name: what a checkpoint holds.
        loop, rollout: the place in the run, and the rollout in flight between two minibatches.
        session_episodes, session_tokens: of this call of `train`, not of the run that it resumes.
    """

    args: PPOConfig
    adapters: AdapterSet
    updater: Updater
    collector: Collector
    trainables: dict[str, nn.Parameter]
    loop: LoopState
    rollout: Rollout | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the start or exactly where a checkpoint left off (True: the newest complete one)."""
        if resume_from_checkpoint is True:
            newest = last_complete(Path(str(self.args.output_dir)))
            if newest is None:
                raise UserError(str(self.args.output_dir), "it holds no complete checkpoint", "start without resuming")
            resume_from_checkpoint = str(newest)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_launch(self) -> None:
        """Refuse launches that would cut the base into pieces.

        Raises:
            UserError: DeepSpeed or FSDP.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "accelerate launch",
                "the base is to be sharded (DeepSpeed or FSDP), but PPO keeps a whole frozen base on each device",
                "launch with distributed_type MULTI_GPU or MULTI_CPU, or quantize the base",
            )
        self.args._n_gpu = min(self.args.n_gpu, 1)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward: mixed precision where the settings ask for it."""
        return self.accelerator.autocast()

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """Over all processes: "sum" or "max"."""
        if self.args.world_size == 1:
            return tensor
        if how == "max":
            return self.accelerator.gather(tensor.reshape(1)).max()  # type: ignore[union-attr]
        return self.accelerator.reduce(tensor, "sum")  # type: ignore[return-value]

    def share_start(self) -> None:
        """Every process takes the first one's policy, value and reference, as DistributedDataParallel would have it.

        LoRA's random numbers may differ: a script need not set a seed before it makes its model.
        """
        if self.args.world_size == 1:
            return
        with torch.no_grad():
            for parameter in (*self.trainables.values(), *self.adapters.parameters(REF)):
                parameter.copy_(broadcast(parameter.detach()))  # type: ignore[arg-type]

    def begin(self, max_steps: int, resume: str | None) -> None:
        """Fresh state, optimiser and schedule, or those of the checkpoint `resume`."""
        args = self.args
        self.state = TrainerState(
            stateful_callbacks=[  # pyright: ignore[reportArgumentType]
                each for each in [*self.callback_handler.callbacks, self.control] if isinstance(each, ExportableState)
            ]
        )
        self.rollout = None
        self.session_episodes, self.session_tokens = 0, 0.0
        if self._created_lr_scheduler:  # by an earlier `train`, so not handed in by the caller
            self.optimizer = self.lr_scheduler = None
        self.loop = LoopState(kl_coef=args.kl_coef, world_size=args.world_size)
        if resume is not None:
            self.state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
            self._load_callback_state()
            self.loop = load_state(Path(resume), args.world_size)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.compute_steps(args, max_steps)
        self.state.init_training_references(self, max_steps, int(args.num_train_epochs), None)
        self.create_optimizer()
        self.create_scheduler(max_steps)
        self.collector.running = RunningScale(*self.loop.running)
        if resume is not None:
            self._load_optimizer_and_scheduler(resume)
            self._load_rng_state(resume)
            if self.loop.slot:
                self.rollout = load_rollout(Path(resume), args.process_index, args.device)
        if args.keep_every and self.is_world_process_zero():
            # a resumed run passes the steps after its checkpoint once more
            forget_policies(self._policies(), after=self.state.global_step)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.control.should_training_stop = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One optimiser, two groups: policy and value, each with its learning rate."""
        if self.optimizer is None:
            args = self.args
            cls, kwargs = self.get_optimizer_cls_and_kwargs(args, None)
            value_rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
            groups: list[dict[str, Any]] = [
                {"params": self.updater.policy, "lr": args.learning_rate, "weight_decay": args.weight_decay},
                {"params": self.updater.value, "lr": value_rate, "weight_decay": args.weight_decay},
            ]
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer  # type: ignore[return-value]

    def keep_policy(self) -> None:
        """At the end of every `keep_every`-th iteration but the last, whose policy is the run's result."""
        args, state = self.args, self.state
        over = state.global_step >= state.max_steps or self.control.should_training_stop
        if args.keep_every and not over and self.loop.iteration % args.keep_every == 0 and self.is_world_process_zero():
            keep_policy(self.adapters, self._policies(), state.global_step)

    def _policies(self) -> Path:
        return Path(self.args.policies_dir or Path(str(self.args.output_dir)) / POLICIES)

    def end(self, began: float, episodes: int) -> TrainOutput:
        """The last log entry and what `train` returns; `began` is a `time.time`."""
        tokens = self.loop.totals.get("tokens", 0.0)
        loss = self.loop.totals["policy_loss"] / tokens if tokens else 0.0
        metrics = speed_metrics("train", began, num_samples=episodes, num_steps=self.state.global_step)
        metrics["train_loss"] = loss
        self.log(dict(metrics))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, loss, metrics)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy as an ordinary PEFT adapter, with the tokenizer. The Trainer asks every process; one writes."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.adapters.save("default", folder)
        self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _save_checkpoint(self, model: nn.Module | None, trial: Any) -> None:
        args = self.args
        if args.save_only_model:
            super()._save_checkpoint(model, trial)  # type: ignore[arg-type]
            return
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if args.should_save:
            reopen(folder)
        self.accelerator.wait_for_everyone()
        save_tensors(folder, self.trainables, self.rollout, args.process_index)
        # the Trainer would remove the older checkpoints before this one is complete
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[arg-type]
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if args.should_save:
            self.loop.running = self.collector.running.state()
            save_state(folder, self.loop)
            remove_older(folder, limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainables(Path(resume_from_checkpoint), self.trainables)
