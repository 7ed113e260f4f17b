"""What the methods refuse of settings that their configs take, each its own: read by `check.py`.

They stand here and not beside their trainers, because they must be known without what only training needs.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import UserError, gathering
from ..models.tokens import load_tokenizer
from .job import StageJob, no_reward
from .sample.settings import ALL, BEST_WORST, THRESHOLD
from .serving.kinds import check_kind
from .serving.place import place_of
from .serving.settings import CORRECTIONS
from .teachers import check_teacher

if TYPE_CHECKING:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.kto_config import KTOConfig

    from .distill import DistillationConfig
    from .grpo import GRPOConfig
    from .ppo.config import OnPolicyConfig, PPOConfig, RewardedConfig

_WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""The losses that TRL has with every f-divergence."""
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses of TRL's DPOTrainer that look at `label_smoothing`."""


def dpo_problems(job: StageJob, args: "DPOConfig") -> list[UserError]:
    """What TRL's DPOTrainer refuses of settings that its config takes."""
    here, losses, found = f"stages.{job.name}", set(args.loss_type), list[UserError]()
    if not losses:
        found.append(UserError(f"{here}.loss_type", "names no loss", "write sigmoid, say, or leave it out"))
    weights = args.loss_weights
    if weights is not None and (min(weights, default=0) < 0 or not any(weights)):
        said = f"is {weights}, expected numbers of 0 or more, one of them above 0"
        found.append(UserError(f"{here}.loss_weights", said, "correct the weights"))
    if args.beta == 0 and losses - {"sft"}:
        said = f"is 0, with which {min(losses - {'sft'})} learns nothing"
        found.append(UserError(f"{here}.beta", said, "use a number above 0, such as 0.1"))
    if args.f_divergence_type != "reverse_kl" and (others := losses - _WITH_DIVERGENCE):
        said = f"is {args.f_divergence_type!r}, which {min(others)} has no form of"
        found.append(UserError(f"{here}.f_divergence_type", said, f"use reverse_kl, or {', '.join(_WITH_DIVERGENCE)}"))
    if args.use_weighting and losses & {"aot", "aot_unpaired"}:
        found.append(UserError(f"{here}.use_weighting", "aot sorts the pairs that it would weigh", "leave it out"))
    if "exo_pair" in losses and args.label_smoothing == 0:
        said = "is 0, and exo_pair needs label smoothing. Label smoothing must be greater than 0.0"
        found.append(UserError(f"{here}.label_smoothing", said, "set label_smoothing: 1e-3"))
    if args.label_smoothing and not losses & set(_SMOOTHED):
        said = f"{args.label_smoothing} has no effect with loss_type {', '.join(sorted(losses))}"
        remedy = (
            f"use a loss_type that smooths labels ({', '.join(_SMOOTHED)}; robust is the usual one), or leave it out"
        )
        found.append(UserError(f"{here}.label_smoothing", said, remedy))
    idle = {
        "discopop_tau": ("discopop" in losses, "loss_type discopop"),
        "f_alpha_divergence_coef": (args.f_divergence_type == "alpha_divergence", "f_divergence_type alpha_divergence"),
    }
    found += [
        UserError(f"{here}.{key}", f"has no effect without {needs}", "leave it out, or set that")
        for key, (used, needs) in idle.items()
        if not used and job.says(key) is not None
    ]
    return found


def kto_problems(job: StageJob, args: "KTOConfig") -> list[UserError]:
    """What cannot estimate z0 from a batch (D4)."""
    found: list[UserError] = []
    if not (args.desirable_weight or args.undesirable_weight):
        said = "is 0, as desirable_weight is: no reply would count"
        found.append(UserError(f"stages.{job.name}.undesirable_weight", said, "set one of them above 0"))
    if args.loss_type == "kto":
        with gathering(found):
            check_batch(job, args.per_device_train_batch_size, 2)
        if args.train_sampling_strategy != "sequential":
            said = f"is {args.train_sampling_strategy!r}; z0 pairs neighbours in an order that is shuffled once"
            found.append(UserError(f"stages.{job.name}.train.train_sampling_strategy", said, "leave it out"))
    return found


def check_batch(job: StageJob, batch_size: int, rows: int) -> None:
    """Raises UserError where a batch, or the data, has no two rows to estimate z0 from (D4)."""
    if batch_size < 2 or rows < 2:
        what = f"per_device_train_batch_size is {batch_size}" if batch_size < 2 else "there is one row"
        raise UserError(
            f"stages.{job.name}.train",
            f"{what}; loss_type kto estimates its KL from mismatched pairs within a batch, so it needs two rows",
            "use a batch of 2 or more, or loss_type: apo_zero_unpaired",
        )


def ppo_problems(job: StageJob, args: "PPOConfig") -> list[UserError]:
    """What the config takes and a run would refuse: see `on_policy_problems`; a horizon without a target."""
    return on_policy_problems(job, args, kl_horizon=(args.kl_target is not None, "kl.target"))


def grpo_problems(job: StageJob, args: "GRPOConfig") -> list[UserError]:
    """See `on_policy_problems`; and settings of GRPO that leave others without effect."""
    here, apart = f"stages.{job.name}", args.multi_objective_aggregation == "normalize_then_sum"
    surrogate = args.loss_type != "cispo"
    found = on_policy_problems(
        job,
        args,
        epsilon=(surrogate, "a loss_type that clips on both sides"),
        delta=(surrogate, "a loss_type that clips on both sides"),
        use_bias_correction_kl=(args.beta > 0, "beta"),
        scale_rewards=(not apart, "multi_objective_aggregation: sum_then_normalize"),
    )
    if apart:
        idle = {
            "reward_combination": args.reward_combination == "ensemble",
            "reward_clip": args.reward_clip is not None,
            "reward_scale": args.reward_scale == "running",
            "missing_eos_penalty": args.missing_eos_penalty is not None,
            "missing_eos_score": args.missing_eos_score is not None,
        }
        said = "has no effect with normalize_then_sum, which adds up the sources' own scores, each normalised"
        found += [UserError(f"{here}.{key}", said, "leave it out") for key, used in idle.items() if used]
    return found


def on_policy_problems(job: StageJob, args: "RewardedConfig", **idle: tuple[bool, str]) -> list[UserError]:
    """What the config takes and a run would refuse: no reward, two lengths of the run, gradients that vanish.

    Args:
        idle: the method's own parameters that need another: whether they have it, and what it is.
    """
    found = _loop_problems(job, args, **idle)
    if not job.rewards:
        found.append(no_reward(job))
    found += _weight_problems(job, args.reward_combination)
    if args.reward_combination != "ensemble" and job.says("ensemble_penalty") is not None:
        found.append(_idle(job, "ensemble_penalty", "reward_combination: ensemble"))
    return found


def distill_problems(job: StageJob, args: "DistillationConfig") -> list[UserError]:
    """What the config takes and a run would refuse: no teacher, or one with another vocabulary."""
    found = _loop_problems(job, args)
    said = "there are no advantages to weigh in a distillation"
    asked = (key for key in CORRECTIONS if job.says(key) is not None)
    found += [UserError(f"stages.{job.name}.rollout.{key}", said, "leave it out") for key in asked]
    if job.teacher is None:
        remedy = "name a stage, a folder or a hub id"
        return [*found, UserError(f"stages.{job.name}.teacher", "no teacher is given", remedy)]
    if (job.base.path / "config.json").is_file():
        with gathering(found):
            tokenizer = load_tokenizer(job.base, job.chat_template, job.template_date)
            check_teacher(job.teacher, job.base, tokenizer)
    return found


def _idle(job: StageJob, key: str, needs: str) -> UserError:
    return UserError(f"stages.{job.name}.{key}", f"has no effect without {needs}", "leave it out, or set that")


def _loop_problems(job: StageJob, args: "OnPolicyConfig", **idle: tuple[bool, str]) -> list[UserError]:
    """What every on-policy method refuses, whether its responses get scores or not."""
    found = []
    if job.dtype == "float16" or args.fp16:
        key = "model.dtype" if job.dtype == "float16" else f"stages.{job.name}.train.fp16"
        said = f"float16, in which {args.method}'s gradients vanish: its loss is not scaled up"
        found.append(UserError(key, said, "use bfloat16, or float32"))
    if args.total_episodes is not None and "num_train_epochs" in job.train:
        said = f"has no effect beside total_episodes, which is {args.total_episodes}"
        found.append(UserError(f"stages.{job.name}.train.num_train_epochs", said, "keep one of them"))
    found += _server_problems(job, args)
    idle |= {"num_log_samples": (args.log_samples_every > 0, "log_samples_every")}
    found += [_idle(job, key, needs) for key, (used, needs) in idle.items() if not used and job.says(key) is not None]
    return found


def _server_problems(job: StageJob, args: "OnPolicyConfig") -> Iterator[UserError]:
    """What of a server that draws could not be; it is not asked for anything yet."""
    here, found = f"stages.{job.name}.rollout", list[UserError]()
    with gathering(found):
        place = place_of(args, here)
        if place is not None:
            check_kind(dataclasses.asdict(job.lora) | {"r": job.lora.rank}, here)
    yield from found
    if args.rollout_engine is not None and job.says("rollout_micro_batch_size") is not None:
        said = f"has no effect: {args.rollout_engine} says itself how many replies it draws at once"
        yield UserError(f"stages.{job.name}.rollout_micro_batch_size", said, "leave it out")
    low, high = args.importance_sampling_clip_min, args.importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        said = f"is {low:g}, expected less than importance_sampling_clip_max = {high:g}"
        yield UserError(f"{here}.importance_sampling_clip_min", said, "correct one of them")
    if low is None and high is None and args.importance_sampling_mode.endswith("truncate"):
        said = "truncates, and importance_sampling_clip_max and _min are none"
        yield UserError(f"{here}.importance_sampling_mode", said, "set one of them")
    given = [key for key in CORRECTIONS if job.says(key) is not None]
    if given and args.rollout_engine is None:
        said = "has no effect without engine: the policy draws its replies itself"
        yield UserError(f"{here}.{given[0]}", said, "leave it out, or write engine: vllm")


def _weight_problems(job: StageJob, combination: str) -> Iterator[UserError]:
    """Weights of several rewards that come to nothing, or that nothing looks at."""
    here = f"stages.{job.name}.reward"
    if job.rewards and not any(each.weight for each in job.rewards):
        yield UserError(here, "every weight is 0: no reply would be better than another", "give one of them a weight")
    if combination == "ensemble" and any(each.weight != 1 for each in job.rewards):
        said = "an ensemble takes the mean of its rewards, whatever their weights"
        yield UserError(here, said, "leave the weights out, or write sum")


def sample_problems(job: StageJob, args: object) -> list[UserError]:
    """What of a sampling stage's settings does not go together. `args` is not looked at: nothing trains."""
    del args
    return list(_sample_problems(job))


def _sample_problems(job: StageJob) -> Iterator[UserError]:
    here, keep = f"stages.{job.name}", str(job.method_value("keep"))
    n, threshold = job.method_value("n"), job.method_value("threshold")
    if not job.rewards:
        yield no_reward(job)
    yield from _weight_problems(job, job.method_value("reward_combination"))
    if keep == BEST_WORST and n < 2:
        yield UserError(f"{here}.n", f"is {n}, and the best and the worst are two replies", "use n: 2 or more")
    if keep == THRESHOLD and threshold is None:
        yield UserError(f"{here}.threshold", "is missing, and keep is threshold", "write the least score to keep")
    if threshold is not None and keep not in (THRESHOLD, ALL):
        yield UserError(f"{here}.threshold", f"has no effect with keep: {keep}", "leave it out, or set keep: threshold")
    if job.says("margin") is not None and keep != BEST_WORST:
        yield UserError(f"{here}.margin", f"has no effect with keep: {keep}", "leave it out, or set keep: best_worst")
    if job.says("ensemble_penalty") is not None and job.method_value("reward_combination") != "ensemble":
        remedy = "leave it out, or set reward_combination: ensemble"
        yield UserError(f"{here}.ensemble_penalty", "has no effect with a sum", remedy)
