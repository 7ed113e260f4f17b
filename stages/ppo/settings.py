"""The settings of on-policy methods, typed once: fields of their configs and words of the recipe alike.

Imports no torch.
"""

from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval

from ..serving.settings import SampledSettings

Positive = Annotated[int, Ge(1)]
Above0 = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(kw_only=True)
class OnPolicySettings(SampledSettings):
    """Of every method that learns from what its policy says: sampling, the length of the run, the brakes.

    One iteration: `rollout_batch_size` episodes over all processes, and passes over them, each in `num_mini_batches`
    optimiser steps.
    """

    rollout_batch_size: Positive = field(default=64, metadata={"help": "Episodes per iteration, over all processes."})
    num_mini_batches: Positive = field(default=1, metadata={"help": "Optimiser steps per pass."})
    total_episodes: Positive | None = field(
        default=None,
        metadata={"help": "Length of the run; None: num_train_epochs passes over the prompts, rounded up."},
    )

    max_new_tokens: Positive = field(default=64, metadata={"help": "Longest response, EOS included."})
    temperature: Above0 = field(default=1.0, metadata={"help": "Divides the logits, in sampling and in training."})
    top_k: Annotated[int, Ge(0)] = field(
        default=0, metadata={"help": "0: all tokens. A cut biases the ratio; see top_p."}
    )
    top_p: Annotated[float, Interval(gt=0, le=1)] = field(default=1.0, metadata={"help": "1: all tokens."})
    rollout_micro_batch_size: Positive | None = field(
        default=None,
        metadata={
            "help": "Prompts decoded at once on one device; None: 32 to 128 on a CPU, what memory holds on a GPU."
        },
    )

    mismatch_tolerance: Above0 | None = field(
        default=None,
        metadata={
            "help": "Stop where sampler and training forward differ by more nats per token, in the mean or as a KL. "
            "None: 0.002 in fp32, 0.15 in 16 bits."
        },
    )
    target_approx_kl: Above0 | None = field(
        default=None, metadata={"help": "Stop the iteration's epochs past 1.5 times this (old to new, per token)."}
    )
    max_ratio: Above0 | None = field(default=10.0, metadata={"help": "Skip a minibatch whose mean ratio is above."})

    log_samples_every: Annotated[int, Ge(0)] = field(
        default=10, metadata={"help": "Write generations every so many iterations; 0: no."}
    )
    num_log_samples: Annotated[int, Ge(0)] = field(default=4, metadata={"help": "How many generations each time."})
    keep_every: Positive | None = field(default=None, metadata={"help": "Keep the policy every so many iterations."})


@dataclass(kw_only=True)
class RewardedSettings(OnPolicySettings):
    """Of every such method whose responses get scores."""

    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Subtracted where no EOS came."})
    missing_eos_score: float | None = field(default=None, metadata={"help": "Replaces the score where no EOS came."})
    normalize_rewards: bool = field(
        default=True, metadata={"help": "Subtract the mean score of reference responses, from the adapter's lineage."}
    )
    reward_scale: Literal["none", "std", "running"] = field(
        default="none", metadata={"help": "Divide scores by the lineage's std, or by a running one."}
    )
    reward_clip: Above0 | None = field(default=None, metadata={"help": "Clip the combined score to +- this."})
    reward_combination: Literal["sum", "ensemble"] = field(
        default="sum", metadata={"help": "Weighted sum, or mean minus ensemble_penalty times std."}
    )
    ensemble_penalty: Annotated[float, Ge(0)] = field(default=1.0, metadata={"help": "Lambda of the ensemble."})


@dataclass(kw_only=True)
class PPOSettings(RewardedSettings):
    """One iteration has `num_ppo_epochs` passes.

    Sources: Ouyang et al. 2022 (arXiv 2203.02155), Huang et al. 2024 (arXiv 2403.17031).
    """

    num_ppo_epochs: Positive = field(default=4, metadata={"help": "Passes over each rollout."})

    kl_coef: Annotated[float, Ge(0)] = field(
        default=0.05, metadata={"help": "KL coefficient beta (the starting one if adaptive)."}
    )
    kl_in: Literal["reward", "loss"] = field(default="reward", metadata={"help": "Where the KL penalty stands."})
    kl_estimator: Literal["k1", "k2", "k3", "k2_sequence"] | None = field(
        default=None, metadata={"help": "None: k1 in the reward, k2 in the loss."}
    )
    kl_target: Above0 | None = field(default=None, metadata={"help": "Nats per sequence; None: fixed coefficient."})
    kl_horizon: Above0 = field(default=10_000, metadata={"help": "Episodes, of the adaptive controller."})

    gamma: Share = field(default=1.0, metadata={"help": "Discount."})
    lam: Share = field(default=0.95, metadata={"help": "GAE's lambda."})
    cliprange: Above0 = field(default=0.2, metadata={"help": "Clip of the ratio."})
    cliprange_value: Above0 | None = field(default=0.2, metadata={"help": "Clip of the value; None: none."})
    vf_coef: Annotated[float, Ge(0)] = field(default=0.1, metadata={"help": "Factor of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Factor of the entropy bonus."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over the whole rollout, all processes."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Rescale rewards, keeping their mean."})

    value: Literal["separate", "shared"] = field(
        default="separate", metadata={"help": "Value: an adapter of its own, or a head on the policy's trunk."}
    )
    value_learning_rate: Annotated[float, Ge(0)] | None = field(default=None, metadata={"help": "None: the policy's."})


@dataclass(kw_only=True)
class GroupSettings(RewardedSettings):
    """Of methods that compare the replies to one prompt with each other: GRPO and RLOO. Names are TRL's."""

    num_generations: Annotated[int, Ge(2)] = field(
        default=8, metadata={"help": "Replies to each prompt of an iteration; rollout_batch_size counts them all."}
    )
    num_iterations: Positive = field(default=1, metadata={"help": "Passes over each rollout."})
    epsilon: Annotated[float, Interval(gt=0, lt=1)] = field(default=0.2, metadata={"help": "Clip of the ratio."})
    epsilon_high: Above0 | None = field(
        default=None, metadata={"help": "Its upper side; None: epsilon. DAPO has 0.28; cispo needs it (5.0)."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Replies without EOS do not train; they stay in their group's statistics."}
    )


GroupLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
"""TRL's names of what the terms of GRPO's loss are divided by; cispo has terms of its own besides."""


@dataclass(kw_only=True)
class GRPOSettings(GroupSettings):
    """One iteration has `num_iterations` passes over groups of `num_generations` replies.

    Source: Shao et al. 2024 (arXiv 2402.03300); those of the variants stand at the functions (`stages/losses.py`).
    """

    beta: Annotated[float, Ge(0)] = field(
        default=0.04, metadata={"help": "Factor of the KL to the reference, in the loss; 0: none is measured."}
    )
    loss_type: GroupLoss = field(
        default="dapo",
        metadata={
            "help": "What terms are averaged over: dapo tokens of the rollout, bnpo of the step, grpo each reply's and "
            "replies, dr_grpo a constant; cispo clips weights."
        },
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group", metadata={"help": "Whose standard deviation advantages are divided by."}
    )
    importance_sampling_level: Literal["token", "sequence"] = field(
        default="token", metadata={"help": "A ratio for each token, or one a reply (GSPO)."}
    )
    delta: Above0 | None = field(
        default=None, metadata={"help": "Bound of the ratio where the advantage is below 0; None: none."}
    )
    top_entropy_quantile: Share = field(
        default=1.0, metadata={"help": "Only the rollout's tokens of highest entropy train, this share of them."}
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = field(
        default="sum_then_normalize", metadata={"help": "Of several rewards; the second is GDPO."}
    )
    off_policy_mask_threshold: Above0 | None = field(
        default=None,
        metadata={
            "help": "Leave out replies with a negative advantage whose tokens have become less likely than when they "
            "were drawn, by more nats a token; None: none."
        },
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL's terms by the ratio, so that it is that of the policy now."}
    )


@dataclass(kw_only=True)
class RLOOSettings(GroupSettings):
    """One iteration has `num_iterations` passes over groups of `num_generations` replies.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740).
    """

    num_generations: Annotated[int, Ge(2)] = field(
        default=2, metadata={"help": "Replies to each prompt of an iteration; rollout_batch_size counts them all."}
    )
    beta: Annotated[float, Ge(0)] = field(
        default=0.05, metadata={"help": "Factor of the KL to the reference, in the reward; 0: none is measured."}
    )
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Advantages over the whole rollout have mean 0 and standard deviation 1."}
    )


@dataclass(kw_only=True)
class DistillSettings(OnPolicySettings):
    """A teacher's distributions are learned, at what the student says itself. One iteration has one pass.

    Source: Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649); names are TRL's.
    """

    beta: Share = field(
        default=1.0,
        metadata={
            "help": "What is brought down: 0 the forward KL (teacher to student), 1 the reverse KL, in between the "
            "generalised Jensen-Shannon divergence."
        },
    )
    lmbda: Share = field(
        default=1.0,
        metadata={
            "help": "Share of the iterations that learn on the student's own replies; the others on the data's "
            "(GKD's lambda)."
        },
    )


def expected(hint: Any, value: object) -> str | None:
    """What a setting of that type should be, in words; None where the value is that.

    Args:
        hint: an annotation of settings: a type, a Literal, one of them with bounds, or None as well.
    """
    if get_origin(hint) in (Union, UnionType):
        options = [each for each in get_args(hint) if each is not type(None)]
        wanted = [expected(each, value) for each in options]
        return None if value is None or None in wanted else f"{' or '.join(str(each) for each in wanted)} or none"
    if get_origin(hint) is Literal:
        known = get_args(hint)
        return None if value in known else f"one of {', '.join(known)}"
    if get_origin(hint) is not Annotated:
        return None
    return next((words for bound in get_args(hint)[1:] if (words := _out_of(bound, value)) is not None), None)


def _out_of(bound: object, value: Any) -> str | None:
    match bound:
        case Gt(gt=low):
            return None if value is not None and value > low else f"more than {low}"
        case Ge(ge=low):
            return None if value is not None and value >= low else f"at least {low}"
        case Interval(gt=low, lt=high) if low is not None and high is not None:
            return None if value is not None and low < value < high else f"more than {low}, less than {high}"
        case Interval(gt=low, ge=None, le=high) if low is not None:
            return None if value is not None and low < value <= high else f"more than {low}, at most {high}"
        case Interval(ge=low, le=high):
            return None if value is not None and low <= value <= high else f"{low} to {high}"
        case _:
            raise TypeError(f"{bound!r} is no bound that is known here")
