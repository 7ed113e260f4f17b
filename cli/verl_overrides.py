"""From a PPO stage's settings to verl's names, and what verl has no name for.

verl 0.9.1 (the release on PyPI; verl/trainer/config/ppo_trainer.yaml and what it is composed of). The names are held
against that release's by a test.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from ..models.lora import LoraSpec
    from ..stages.job import StageJob
    from ..stages.ppo.config import PPOConfig

VERSION = "0.9.1"
_NEVER = 1e6
"""A bound that is never met: where verl has no word for none."""
_KL = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
_ACTOR, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
_ROLLOUT, _SERVED = "actor_rollout_ref.rollout", "reward.reward_model"


class Override(NamedTuple):
    """One of verl's keys and its value; `ours`: the recipe's word for it, empty where it is none."""

    key: str
    value: Any
    ours: str = ""


class Sizes(NamedTuple):
    """Of the exported rows: how many, and the longest prompt in tokens."""

    rows: int
    prompt: int


def overrides(args: "PPOConfig", job: "StageJob", sizes: Sizes, targets: Sequence[str]) -> list[Override]:
    """All settings that verl has a name for, but the places of files.

    Args:
        targets: names of the modules that adapters are on.

    Raises:
        UserError: a value that verl cannot take and that nothing near could stand for.
    """
    return [
        *_algorithm(args, job),
        *_optimiser(args, sizes),
        *_adapter(job, targets),
        *_rollout(args, job, sizes),
        *_seeds(args),
    ]


def _algorithm(args: "PPOConfig", job: "StageJob") -> Iterator[Override]:
    yield Override("algorithm.adv_estimator", "gae")
    yield Override("algorithm.gamma", args.gamma, "gamma")
    yield Override("algorithm.lam", args.lam, "lam")
    estimator, in_reward = args.estimator(), args.kl_in == "reward"
    if estimator not in _KL:
        said = f"{estimator} is none of verl's, which sums over tokens"
        raise UserError(f"stages.{job.name}.kl.estimator", said, "write k2")
    yield Override("algorithm.use_kl_in_reward", in_reward and args.kl_coef > 0, "kl.in")
    yield Override(f"{_ACTOR}.use_kl_loss", not in_reward and args.kl_coef > 0, "kl.in")
    if in_reward:
        yield Override("algorithm.kl_penalty", _KL[estimator], "kl.estimator")
        yield Override("algorithm.kl_ctrl.type", "fixed", "kl.target")
        yield Override("algorithm.kl_ctrl.kl_coef", args.kl_coef, "kl.coef")
    else:
        yield Override(f"{_ACTOR}.kl_loss_type", _KL[estimator], "kl.estimator")
        yield Override(f"{_ACTOR}.kl_loss_coef", args.kl_coef, "kl.coef")
    for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high"):
        yield Override(f"{_ACTOR}.{name}", args.cliprange, "cliprange")
    # verl bounds the loss of unlikely actions a second time, which preftune does not
    yield Override(f"{_ACTOR}.clip_ratio_c", _NEVER)
    yield Override("critic.cliprange_value", args.cliprange_value or _NEVER, "cliprange_value")
    yield Override(f"{_ACTOR}.entropy_coeff", args.entropy_coef, "entropy_coef")
    yield Override(f"{_ACTOR}.loss_agg_mode", "token-mean")


def _optimiser(args: "PPOConfig", sizes: Sizes) -> Iterator[Override]:
    steps = args.num_rollouts(sizes.rows)
    yield Override("data.train_batch_size", args.rollout_batch_size, "rollout_batch_size")
    yield Override(f"{_ACTOR}.ppo_epochs", args.num_ppo_epochs, "num_ppo_epochs")
    size = args.rollout_batch_size // args.num_mini_batches
    yield Override(f"{_ACTOR}.ppo_mini_batch_size", size, "num_mini_batches")
    yield Override(f"{_ACTOR}.shuffle", True)
    for place in (f"{_ACTOR}.ppo", "critic.ppo", "actor_rollout_ref.ref.log_prob", f"{_ROLLOUT}.log_prob"):
        key = f"{place}_micro_batch_size_per_gpu"
        yield Override(key, args.per_device_train_batch_size, "per_device_train_batch_size")
    yield Override("trainer.total_training_steps", steps, "total_episodes")
    # an incomplete batch at the end of the prompts is left out
    yield Override("trainer.total_epochs", math.ceil(steps / (sizes.rows // args.rollout_batch_size)))
    rates = (args.learning_rate, args.learning_rate if args.value_learning_rate is None else args.value_learning_rate)
    kind = "cosine" if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "cosine" else "constant"
    # verl's schedule goes a step for each rollout
    warmup = math.ceil(args.get_warmup_steps(steps * args.steps_per_iteration()) / args.steps_per_iteration())
    for place, rate, ours in zip((_ACTOR, "critic"), rates, ("learning_rate", "value_learning_rate"), strict=True):
        yield Override(f"{place}.optim.lr", rate, ours)
        yield Override(f"{place}.optim.lr_scheduler_type", kind, "lr_scheduler_type")
        yield Override(f"{place}.optim.lr_warmup_steps", warmup, "warmup_steps")
        yield Override(f"{place}.optim.weight_decay", args.weight_decay, "weight_decay")
        yield Override(f"{place}.optim.betas", [args.adam_beta1, args.adam_beta2], "adam_beta1, adam_beta2")
        yield Override(f"{place}.optim.clip_grad", args.max_grad_norm or _NEVER, "max_grad_norm")


def _adapter(job: "StageJob", targets: Sequence[str]) -> Iterator[Override]:
    lora, dtype = job.lora, "fp32" if job.dtype == "float32" else "bf16"
    _check_plain(lora, job.name)
    alpha = lora_alpha(lora, job.name)
    for place in (_MODEL, "critic.model"):
        yield Override(f"{place}.lora_rank", lora.r, "lora.r")
        yield Override(f"{place}.lora_alpha", alpha, "lora.alpha")
        yield Override(f"{place}.target_modules", list(targets), "lora.target_modules")
    for place in (f"{_ACTOR}.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp"):
        yield Override(f"{place}.model_dtype", dtype, "model.dtype")
    for place in (_ACTOR, "actor_rollout_ref.ref", "critic"):
        yield Override(f"{place}.strategy", "fsdp2")


def _check_plain(lora: "LoraSpec", stage: str) -> None:
    """Raises UserError where the adapter is more than verl has words for."""
    more = {
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.altering,
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "target_parameters": lora.target_parameters,
        "trainable_token_indices": lora.trainable_token_indices,
        "added_tokens": lora.added_tokens,
    }
    for name, asked in more.items():
        if asked:
            said = f"is {getattr(lora, name)}, which verl does not take"
            raise UserError(f"stages.{stage}.lora.{name}", said, "train it here, or with plain LoRA")


def lora_alpha(lora: "LoraSpec", stage: str) -> int:
    """The alpha that gives the same scaling over the rank in verl, which takes whole numbers.

    Raises:
        UserError: there is none.
    """
    alpha = lora.alpha * math.sqrt(lora.r) if lora.use_rslora else lora.alpha
    if not math.isclose(alpha, round(alpha), rel_tol=1e-9):
        remedy = "take one for which alpha (with use_rslora: alpha times the root of r) is whole"
        raise UserError(f"stages.{stage}.lora.alpha", f"{alpha:.6g} over the rank is no whole number for verl", remedy)
    return round(alpha)


def _rollout(args: "PPOConfig", job: "StageJob", sizes: Sizes) -> Iterator[Override]:
    yield Override("data.max_prompt_length", sizes.prompt, "max_prompt_length")
    yield Override("data.max_response_length", args.max_new_tokens, "max_new_tokens")
    yield Override("data.truncation", "error")
    yield Override(f"{_ROLLOUT}.name", "vllm")
    yield Override(f"{_ROLLOUT}.n", 1)
    yield Override(f"{_ROLLOUT}.temperature", args.temperature, "temperature")
    yield Override(f"{_ROLLOUT}.top_p", args.top_p, "top_p")
    yield Override(f"{_ROLLOUT}.top_k", args.top_k or -1, "top_k")
    yield Override(f"{_ROLLOUT}.dtype", "float32" if job.dtype == "float32" else "bfloat16", "model.dtype")
    # what verl needs of a rollout with LoRA, and for large ones
    yield Override(f"{_ROLLOUT}.load_format", "safetensors")
    yield Override(f"{_ROLLOUT}.layered_summon", True)


def _seeds(args: "PPOConfig") -> Iterator[Override]:
    for key in ("data.seed", f"{_ACTOR}.data_loader_seed", "critic.data_loader_seed", f"{_ROLLOUT}.seed"):
        yield Override(key, args.seed, "seed")


def served(job: "StageJob", sizes: Sizes, new_tokens: int) -> list[Override]:
    """verl's server of a reward model."""
    dtype = "float32" if job.dtype == "float32" else "bfloat16"
    return [
        Override(f"{_SERVED}.rollout.dtype", dtype, "model.dtype"),
        Override(f"{_SERVED}.enable", True, "reward"),
        Override(f"{_SERVED}.rollout.name", "vllm"),
        Override(f"{_SERVED}.rollout.prompt_length", sizes.prompt + new_tokens + 1),
        Override(f"{_SERVED}.rollout.response_length", 1),
    ]


def run_settings(name: str, share: float | None, steps: int) -> list[Override]:
    """Of the run itself: its name, when checkpoints are written, no validation."""
    every = steps if share is None else max(1, round(share * steps))
    return [
        Override("trainer.project_name", "preftune"),
        Override("trainer.experiment_name", name, "name"),
        Override("trainer.logger", ["console"]),
        Override("trainer.save_freq", every, "checkpoints.share"),
        Override("trainer.test_freq", -1),
        Override("trainer.val_before_train", False),
        Override("reward.custom_reward_function.name", "compute_score"),
    ]


def left_out(args: "PPOConfig", job: "StageJob", reward_stage: bool) -> list[str]:
    """What the stage asks for and verl does otherwise or not at all, a sentence each.

    Args:
        reward_stage: whether a reward stage scores; the value then starts from it.
    """
    return [
        words for words, holds in {**_of_method(args, job, reward_stage), **_of_training(args, job)}.items() if holds
    ]


def _of_method(args: "PPOConfig", job: "StageJob", reward_stage: bool) -> dict[str, bool]:
    own_value = args.value != "shared"
    return {
        f"kl.target {args.kl_target}: verl's controller aims at a KL per token, this one at a KL per reply; the "
        f"coefficient stays at {args.kl_coef}": args.kl_target is not None,
        "value: shared: verl's critic is a model of its own": not own_value,
        f"vf_coef {args.vf_coef}: the critic's optimiser is its own, and a factor does not change its steps": own_value,
        "whiten_advantages: false: verl always whitens": not args.whiten_advantages,
        "whiten_rewards: true: rewards are not rescaled": args.whiten_rewards,
        "missing_eos_penalty, missing_eos_score: a reward function of verl's is not told whether a reply ended":
            args.missing_eos_penalty is not None or args.missing_eos_score is not None,
        "a reply that did not end gets an EOS before the reward model reads it": reward_stage,
        "the reward model's head is rounded to the base's precision": reward_stage and job.dtype != "float32",
        "reward_scale: running: scores are not divided": args.reward_scale == "running",
        f"target_approx_kl {args.target_approx_kl}: every epoch runs": args.target_approx_kl is not None,
        f"max_ratio {args.max_ratio}: no minibatch is skipped": args.max_ratio is not None,
        "mismatch_tolerance: verl does not stop where sampler and trainer differ": True,
        f"rollout.ahead: {args.rollout_ahead}: verl draws each rollout with the policy of then": args.rollout_ahead > 0,
        f"keep_every {args.keep_every}: see trainer.save_freq": args.keep_every is not None,
        f"on_nonfinite: skip({job.nonfinite_skips})": job.nonfinite_skips > 0,
        "what is drawn and sampled: the seed is handed on, the draws are others": True,
    }  # fmt: skip


def _of_training(args: "PPOConfig", job: "StageJob") -> dict[str, bool]:
    scheduler, optimiser = (str(getattr(each, "value", each)) for each in (args.lr_scheduler_type, args.optim))
    known = ("constant", "constant_with_warmup", "cosine")
    return {
        f"lr_scheduler_type {scheduler}: verl knows constant and cosine, and constant is written": scheduler
        not in known,
        "a schedule counts optimiser steps; verl's counts rollouts": scheduler != "constant" or args.warmup_steps > 0,
        f"optim {optimiser}: AdamW is written": not optimiser.startswith("adamw_torch"),
        f"adam_epsilon {args.adam_epsilon}: PyTorch's 1e-08 holds": args.adam_epsilon != 1e-8,
        f"lora.dropout {job.lora.dropout}: verl trains without": job.lora.dropout > 0,
        f"model.quantization {job.quantization}: the base is whole there": job.quantization is not None,
        "model.dtype float32: verl computes in bfloat16 what it keeps in float32": job.dtype == "float32",
        "adapters in float32: verl trains the policy's in the base's precision": job.dtype != "float32",
        "lineage.json, metrics.json and the report: what verl trains lies outside the run": True,
    }
