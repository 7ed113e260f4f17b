"""Configs of on-policy methods: TrainingArguments plus settings. Derived values are methods; what does not divide is an
error.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from transformers import TrainingArguments

from ..kl_control import KLController, kl_controller
from ..losses import KL_ESTIMATORS
from .settings import OnPolicySettings, PPOSettings, RewardedSettings, expected
from .trl_names import CONFIG, refuse_names


@dataclass
class OnPolicyConfig(OnPolicySettings, TrainingArguments):
    """Everything that `transformers.TrainingArguments` takes, and what every on-policy method has.

    `per_device_train_batch_size` is the number of sequences in one training forward and changes no result.
    `logging_steps`, `save_steps` and the learning-rate schedule count optimiser steps; metrics are logged at the end of
    the iteration in which a logging step fell; so is `eval_strategy`'s evaluation made, of `eval_dataset`.

    Attributes:
        method: its name in messages. settings: the method's own dataclass. epochs_field: which of its fields says how
            often a rollout is passed over (None: it is once). names: what users of other trainers write, and what says
            it here.

    Raises:
        ValueError: a value out of range, or sizes that do not divide.
    """

    method: ClassVar[str]
    settings: ClassVar[type[OnPolicySettings]]
    epochs_field: ClassVar[str | None]
    names: ClassVar[dict[str, str]] = CONFIG

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the policy adapter."})
    logging_steps: float = field(default=1, metadata={"help": "Log the iteration in which such a step falls."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm limit, policy and value each."})
    samples_file: str | None = field(default=None, metadata={"help": "None: rollouts.jsonl in output_dir."})
    policies_dir: str | None = field(default=None, metadata={"help": "Of kept policies. None: in output_dir."})
    rollout_place: str = field(default="rollout", metadata={"help": "What messages call the server's settings."})

    def __new__(cls, *args: object, **given: object) -> Any:
        """Names of TRL's and other configs are refused with what says the same here.

        Raises:
            UserError: a name that is no field.
        """
        known = [each.name for each in fields(cls) if each.init]
        refuse_names(cls.__name__, [name for name in given if name not in known], cls.names, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ranges()
        self._check_method()
        self._check_sizes()

    def _check_sizes(self) -> None:
        parts = {"num_mini_batches": self.num_mini_batches, "processes": self.world_size}
        if self.samples_per_prompt() > 1:
            parts = {"num_generations": self.samples_per_prompt(), **parts}
        whole = self.samples_per_prompt() * self.num_mini_batches * self.world_size
        if self.rollout_batch_size % whole:
            raise ValueError(
                f"rollout_batch_size is {self.rollout_batch_size}, expected a multiple of {' x '.join(parts)} "
                f"= {' x '.join(map(str, parts.values()))}"
            )
        if self.total_episodes is not None and self.total_episodes % self.rollout_batch_size:
            raise ValueError(
                f"total_episodes is {self.total_episodes}, expected a multiple of rollout_batch_size "
                f"= {self.rollout_batch_size}"
            )

    def _check_ranges(self) -> None:
        for name, hint in get_type_hints(self.settings, include_extras=True).items():
            if (wanted := expected(hint, getattr(self, name))) is not None:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {wanted}")
        if self.fp16:
            raise ValueError("fp16 is true, expected bf16 or neither: the loss is not scaled, gradients would vanish")
        if self.per_device_train_batch_size < 1:
            raise ValueError(f"per_device_train_batch_size is {self.per_device_train_batch_size}, expected at least 1")
        steps = {} if self.epochs_field is None else {self.epochs_field: self.epochs()}
        steps["num_mini_batches"] = self.num_mini_batches
        if self.max_steps > 0 and self.max_steps % self.steps_per_iteration():
            raise ValueError(
                f"max_steps is {self.max_steps}, expected a multiple of {' x '.join(steps)} "
                f"= {' x '.join(map(str, steps.values()))}, the optimiser steps of one iteration"
            )
        if self.max_steps > 0 and self.total_episodes is not None:
            raise ValueError(
                f"max_steps is {self.max_steps} and total_episodes {self.total_episodes}, expected one of them"
            )
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, expected 1: in {self.method} one "
                "optimiser step is one minibatch (num_mini_batches), in forwards of per_device_train_batch_size"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end is true, expected false: keep_every keeps policies on the way, to be compared"
            )

    def _check_method(self) -> None:
        """What the method asks of its own settings besides their ranges.

        Raises:
            ValueError: settings that do not fit each other.
        """

    def kl_control(self, coef: float | None = None) -> KLController:
        """What the KL coefficient does from iteration to iteration, from `coef` on; None: from the run's start."""
        raise NotImplementedError

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL penalty is taken off the rewards, token by token."""
        raise NotImplementedError

    def measures_kl(self) -> bool:
        """Whether there is a reference."""
        return True

    def first_step_measures(self) -> bool:
        """Whether the old policy's log-probs are those that an iteration's first step computes anyway, which spares a
        forward."""
        return False

    def samples_per_prompt(self) -> int:
        """Replies to each prompt of an iteration."""
        return 1

    def epochs(self) -> int:
        """Passes over each rollout."""
        return 1 if self.epochs_field is None else getattr(self, self.epochs_field)

    def steps_per_iteration(self) -> int:
        """Optimiser steps of one iteration: epochs x minibatches."""
        return self.epochs() * self.num_mini_batches

    def local_rollout_size(self) -> int:
        """Episodes that one process collects in an iteration."""
        return self.rollout_batch_size // self.world_size

    def prompts_per_rollout(self) -> int:
        """Prompts that an iteration takes from the data."""
        return self.rollout_batch_size // self.samples_per_prompt()

    def num_rollouts(self, num_prompts: int) -> int:
        """Iterations of the run: `total_episodes`, or `max_steps` optimiser steps, or passes over the prompts.

        The last of `num_train_epochs` passes is filled up.
        """
        if self.total_episodes is not None:
            return self.total_episodes // self.rollout_batch_size
        if self.max_steps > 0:
            return self.max_steps // self.steps_per_iteration()
        return max(1, -int(-num_prompts * self.num_train_epochs // self.prompts_per_rollout()))


@dataclass
class RewardedConfig(RewardedSettings, OnPolicyConfig):
    """Of methods whose responses get scores."""

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ValueError("missing_eos_penalty and missing_eos_score are both given, expected one of them")


@dataclass
class PPOConfig(PPOSettings, RewardedConfig):
    """Everything that `OnPolicyConfig` takes, and PPO's own settings (`PPOSettings`)."""

    method = "PPO"
    settings = PPOSettings
    epochs_field = "num_ppo_epochs"

    def _check_method(self) -> None:
        allowed = KL_ESTIMATORS[self.kl_in]
        if self.estimator() not in allowed:
            raise ValueError(
                f"kl_estimator is {self.kl_estimator!r} with kl_in {self.kl_in!r}, expected {' or '.join(allowed)}: "
                "k2 and k3 in the reward, and k1 in the loss, do not give KL's gradient (arXiv 2512.21852)"
            )

    def kl_control(self, coef: float | None = None) -> KLController:
        """Adaptive where there is a target."""
        return kl_controller(self.kl_coef if coef is None else coef, self.kl_target, self.kl_horizon)

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_in == "reward"

    def estimator(self) -> str:
        """The KL estimator in use."""
        return self.kl_estimator or KL_ESTIMATORS[self.kl_in][0]
