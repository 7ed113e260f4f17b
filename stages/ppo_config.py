"""PPO's settings: TrainingArguments plus the method. Derived values are methods; what does not divide is an error."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """Everything that `transformers.TrainingArguments` takes, and PPO's own settings.

    One iteration: `rollout_batch_size` episodes over all processes, `num_ppo_epochs` passes over them, each in
    `num_mini_batches` optimiser steps. `per_device_train_batch_size` is the number of sequences in one training forward
    and changes no result. `logging_steps`, `save_steps` and the learning-rate schedule count optimiser steps; metrics
    are logged at the end of the iteration in which a logging step fell.

    Raises:
        ValueError: a value out of range, or sizes that do not divide.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the policy adapter."})
    logging_steps: float = field(default=1, metadata={"help": "Log the iteration in which such a step falls."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm limit, policy and value each."})

    rollout_batch_size: int = field(default=64, metadata={"help": "Episodes per iteration, over all processes."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps per pass."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Length of the run; None: num_train_epochs passes over the prompts, rounded up."},
    )

    max_new_tokens: int = field(default=64, metadata={"help": "Longest response, EOS included."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits, in sampling and in training."})
    top_k: int = field(default=0, metadata={"help": "0: all tokens. A cut biases the ratio; see top_p."})
    top_p: float = field(default=1.0, metadata={"help": "1: all tokens."})
    rollout_micro_batch_size: int = field(default=32, metadata={"help": "Prompts decoded at once on one device."})

    kl_coef: float = field(default=0.05, metadata={"help": "KL coefficient beta (the starting one if adaptive)."})
    kl_in: Literal["reward", "loss"] = field(default="reward", metadata={"help": "Where the KL penalty stands."})
    kl_estimator: Literal["k1", "k2", "k3", "k2_sequence"] | None = field(
        default=None, metadata={"help": "None: k1 in the reward, k2 in the loss."}
    )
    kl_target: float | None = field(default=None, metadata={"help": "Nats per sequence; None: fixed coefficient."})
    kl_horizon: float = field(default=10_000, metadata={"help": "Episodes, of the adaptive controller."})

    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the ratio."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "Clip of the value; None: none."})
    vf_coef: float = field(default=0.1, metadata={"help": "Factor of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Factor of the entropy bonus."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over the whole rollout, all processes."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Rescale rewards, keeping their mean."})
    target_approx_kl: float | None = field(
        default=None, metadata={"help": "Stop the iteration's epochs past 1.5 times this (old to new, per token)."}
    )
    max_ratio: float | None = field(default=10.0, metadata={"help": "Skip a minibatch whose mean ratio is above."})

    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Subtracted where no EOS came."})
    missing_eos_score: float | None = field(default=None, metadata={"help": "Replaces the score where no EOS came."})
    normalize_rewards: bool = field(
        default=True, metadata={"help": "Subtract the mean score of reference responses, from the adapter's lineage."}
    )
    reward_scale: Literal["none", "std", "running"] = field(
        default="none", metadata={"help": "Divide scores by the lineage's std, or by a running one."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Clip the combined score to +- this."})
    reward_combination: Literal["sum", "ensemble"] = field(
        default="sum", metadata={"help": "Weighted sum, or mean minus ensemble_penalty times std."}
    )
    ensemble_penalty: float = field(default=1.0, metadata={"help": "Lambda of the ensemble."})

    value: Literal["separate", "shared"] = field(
        default="separate", metadata={"help": "Value: an adapter of its own, or a head on the policy's trunk."}
    )
    value_learning_rate: float | None = field(default=None, metadata={"help": "None: the policy's."})

    log_samples_every: int = field(default=10, metadata={"help": "Write generations every so many iterations; 0: no."})
    num_log_samples: int = field(default=4, metadata={"help": "How many generations each time."})
    samples_file: str | None = field(default=None, metadata={"help": "None: rollouts.jsonl in output_dir."})
    keep_every: int | None = field(default=None, metadata={"help": "Keep the policy every so many iterations."})
    policies_dir: str | None = field(default=None, metadata={"help": "Of kept policies. None: in output_dir."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ranges()
        self._check_kl()
        if self.rollout_batch_size % (self.num_mini_batches * self.world_size):
            raise ValueError(
                f"rollout_batch_size is {self.rollout_batch_size}, expected a multiple of num_mini_batches x processes "
                f"= {self.num_mini_batches} x {self.world_size}"
            )
        if self.total_episodes is not None and self.total_episodes % self.rollout_batch_size:
            raise ValueError(
                f"total_episodes is {self.total_episodes}, expected a multiple of rollout_batch_size "
                f"= {self.rollout_batch_size}"
            )

    def _check_ranges(self) -> None:
        positive = ("rollout_batch_size", "num_ppo_epochs", "num_mini_batches", "max_new_tokens", "temperature")
        for name in (*positive, "rollout_micro_batch_size", "cliprange", "per_device_train_batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        optional = ("total_episodes", "target_approx_kl", "max_ratio", "kl_target", "cliprange_value", "reward_clip")
        for name in (*optional, "keep_every"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0 or none")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ValueError("missing_eos_penalty and missing_eos_score are both given, expected one of them")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, expected 1: in PPO one optimiser "
                "step is one minibatch (num_mini_batches), in forwards of per_device_train_batch_size"
            )
        if self.eval_strategy != "no":
            raise ValueError(f"eval_strategy is {self.eval_strategy}, expected 'no': PPO logs its own reward and KL")
        for name, known in (
            ("kl_in", ("reward", "loss")),
            ("value", ("separate", "shared")),
            ("reward_scale", ("none", "std", "running")),
            ("reward_combination", ("sum", "ensemble")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def _check_kl(self) -> None:
        allowed = ("k1",) if self.kl_in == "reward" else ("k2", "k2_sequence", "k3")
        if self.estimator() not in allowed:
            raise ValueError(
                f"kl_estimator is {self.kl_estimator!r} with kl_in {self.kl_in!r}, expected {' or '.join(allowed)}: "
                "k2 and k3 in the reward, and k1 in the loss, do not give KL's gradient (arXiv 2512.21852)"
            )

    def estimator(self) -> str:
        """The KL estimator in use."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k2")

    def steps_per_iteration(self) -> int:
        """Optimiser steps of one iteration: epochs x minibatches."""
        return self.num_ppo_epochs * self.num_mini_batches

    def local_rollout_size(self) -> int:
        """Episodes that one process collects in an iteration."""
        return self.rollout_batch_size // self.world_size

    def num_iterations(self, num_prompts: int) -> int:
        """Iterations of the run. Without `total_episodes`, the last pass over the prompts is filled up."""
        if self.total_episodes is not None:
            return self.total_episodes // self.rollout_batch_size
        return max(1, -int(-num_prompts * self.num_train_epochs // self.rollout_batch_size))


KL_KEYS = {
    "coef": "kl_coef",
    "target": "kl_target",
    "horizon": "kl_horizon",
    "in": "kl_in",
    "estimator": "kl_estimator",
}
"""The recipe's `kl:` group, by the fields that its keys stand for."""

PPO_METHOD = ("kl", *(name for name in PPOConfig.__annotations__ if name not in TrainingArguments.__annotations__))
"""What stands beside `train:` in a PPO stage."""
