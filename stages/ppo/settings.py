"""PPO's own settings, typed once: fields of `PPOConfig` and words of the recipe alike. Imports no torch."""

from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval

Positive = Annotated[int, Ge(1)]
Above0 = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(kw_only=True)
class PPOSettings:
    """One iteration: `rollout_batch_size` episodes over all processes, `num_ppo_epochs` passes over them, each in
    `num_mini_batches` optimiser steps.

    Sources: Ouyang et al. 2022 (arXiv 2203.02155), Huang et al. 2024 (arXiv 2403.17031).
    """

    rollout_batch_size: Positive = field(default=64, metadata={"help": "Episodes per iteration, over all processes."})
    num_ppo_epochs: Positive = field(default=4, metadata={"help": "Passes over each rollout."})
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
        metadata={"help": "Prompts decoded at once on one device; None: 32 on a CPU, on a GPU what memory holds."},
    )

    kl_coef: Annotated[float, Ge(0)] = field(
        default=0.05, metadata={"help": "KL coefficient beta (the starting one if adaptive)."}
    )
    kl_in: Literal["reward", "loss"] = field(default="reward", metadata={"help": "Where the KL penalty stands."})
    kl_estimator: Literal["k1", "k2", "k3", "k2_sequence"] | None = field(
        default=None, metadata={"help": "None: k1 in the reward, k2 in the loss."}
    )
    kl_target: Above0 | None = field(default=None, metadata={"help": "Nats per sequence; None: fixed coefficient."})
    kl_horizon: Above0 = field(default=10_000, metadata={"help": "Episodes, of the adaptive controller."})

    mismatch_tolerance: Above0 | None = field(
        default=None,
        metadata={
            "help": "Stop where sampler and training forward differ by more nats per token, in the mean or as a KL. "
            "None: 0.002 in fp32, 0.15 in 16 bits."
        },
    )

    gamma: Share = field(default=1.0, metadata={"help": "Discount."})
    lam: Share = field(default=0.95, metadata={"help": "GAE's lambda."})
    cliprange: Above0 = field(default=0.2, metadata={"help": "Clip of the ratio."})
    cliprange_value: Above0 | None = field(default=0.2, metadata={"help": "Clip of the value; None: none."})
    vf_coef: Annotated[float, Ge(0)] = field(default=0.1, metadata={"help": "Factor of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Factor of the entropy bonus."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over the whole rollout, all processes."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Rescale rewards, keeping their mean."})
    target_approx_kl: Above0 | None = field(
        default=None, metadata={"help": "Stop the iteration's epochs past 1.5 times this (old to new, per token)."}
    )
    max_ratio: Above0 | None = field(default=10.0, metadata={"help": "Skip a minibatch whose mean ratio is above."})

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

    value: Literal["separate", "shared"] = field(
        default="separate", metadata={"help": "Value: an adapter of its own, or a head on the policy's trunk."}
    )
    value_learning_rate: Annotated[float, Ge(0)] | None = field(default=None, metadata={"help": "None: the policy's."})

    log_samples_every: Annotated[int, Ge(0)] = field(
        default=10, metadata={"help": "Write generations every so many iterations; 0: no."}
    )
    num_log_samples: Annotated[int, Ge(0)] = field(default=4, metadata={"help": "How many generations each time."})
    keep_every: Positive | None = field(default=None, metadata={"help": "Keep the policy every so many iterations."})


def expected(hint: Any, value: object) -> str | None:
    """What a setting of that type should be, in words; None where the value is that.

    Args:
        hint: an annotation of `PPOSettings`: a type, a Literal, one of them with bounds, or None as well.
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
        case Interval(gt=low, ge=None, le=high) if low is not None:
            return None if value is not None and low < value <= high else f"more than {low}, at most {high}"
        case Interval(ge=low, le=high):
            return None if value is not None and low <= value <= high else f"{low} to {high}"
        case _:
            raise TypeError(f"{bound!r} is no bound that is known here")
