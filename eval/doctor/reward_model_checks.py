"""Is the reward model good, and is what was saved what was trained?"""

import math

from ..statistics.intervals import wilson_interval
from .finding import Finding, judge

LENGTH_LOOK = 0.5
"""Rank correlation of score and length from which on length explains a quarter of the ranking."""
LENGTH_BROKEN = 0.9
"""From here on length explains four fifths of it: the policy will learn to write long (or short), nothing else."""
LENGTH_SEPARATES = 0.6
"""Accuracy of the better length rule from which on length, and no swapped pairs, is the likely reason."""
SFT_BELOW_LOOK = -2.0
"""Deviations of the demonstrations' scores. A sample of a well-fitted SFT policy is one of them, at about 0; below -2
the policy does not say what it was shown."""
SFT_ABOVE_LOOK = 1.0
"""Nobody writes better than the demonstrations by learning them: above 1 the reward likes something else in them."""
ACCURACY_LOOK, ACCURACY_BROKEN = 0.02, 0.1
"""The same weights on the same pairs flip near-ties only; one pair in ten is no rounding."""
MEAN_LOOK, MEAN_BROKEN = 0.05, 0.25
"""In deviations of the score. Another kernel in bf16 moves a mean over 128 replies by about 0.01."""


def check_accuracy(
    stage: str, accuracy: float, interval: tuple[float, float], n: int, *, longer_wins: float, held_out: bool
) -> Finding:
    """Against a coin and the two rules that read no text (R6); the rules' own rates are uncertain on few pairs too."""
    rule, best = max(("longer wins", longer_wins), ("shorter wins", 1 - longer_wins), key=lambda each: each[1])
    floor, surely = max(best, 0.5), max(wilson_interval(best * n, n)[0], 0.5)
    swapped = "check that chosen and rejected are not swapped; train on more pairs or longer; hold out more pairs"
    remedy = length_remedy(rule, best) if length_separates(accuracy, best) else swapped
    where = "held-out pairs" if held_out else "TRAINING pairs (none are held out, so this flatters)"
    return judge(
        stage,
        "reward accuracy",
        accuracy,
        interval=interval,
        unit=f"of {n} {where}",
        threshold=f"look: the interval reaches down to {floor:.3g} ({rule}: {best:.3g}); broken: all of it lies below "
        f"{surely:.3g}, which a coin or that rule surely has",
        broken=interval[1] < surely,
        look=interval[0] <= floor,
        remedy=remedy,
    )


def length_separates(accuracy: float, best: float) -> bool:
    """Whether a rule that only looks at length tells the pairs apart better than a coin and no worse than the model."""
    return best >= LENGTH_SEPARATES and best >= accuracy


def length_remedy(rule: str, best: float) -> str:
    """What to do where length alone separates the pairs."""
    return (
        f"length alone separates these pairs ({rule}: {best:.3g}), so that their accuracy cannot show anything else: "
        "give pairs whose replies are of like length, or balance which is longer; cap length where the reward is used"
    )


def check_length(stage: str, correlation: float, interval: tuple[float, float], n: int) -> Finding:
    """How much of the score is the reply's length, chosen and rejected replies each ranked among themselves."""
    nearest = 0.0 if interval[0] <= 0 <= interval[1] else min(abs(end) for end in interval)
    return judge(
        stage,
        "reward length",
        correlation,
        interval=interval,
        unit=f"rank correlation of score and length over {n} replies",
        threshold=f"look: {LENGTH_LOOK} or more either way; broken: the whole interval beyond {LENGTH_BROKEN}",
        broken=nearest > LENGTH_BROKEN,
        look=abs(correlation) >= LENGTH_LOOK,
        remedy="balance the pairs' lengths, or cap the reply's length where the reward is used",
    )


def check_sft_reward(stage: str, gap: float, interval: tuple[float, float], n: int, *, policy: str) -> Finding:
    """Mean score of the SFT policy's samples minus the demonstrations', in the latter's deviations. Never broken: it
    tells a weak SFT stage from a reward that likes something else, and needs a person to say which."""
    return judge(
        stage,
        "reward of SFT samples",
        gap,
        interval=interval,
        unit=f"deviations between samples of {policy} and its demonstrations' replies, {n} prompts",
        threshold=f"look: the whole interval below {SFT_BELOW_LOOK:g} or above {SFT_ABOVE_LOOK:g}",
        look=interval[1] < SFT_BELOW_LOOK or interval[0] > SFT_ABOVE_LOOK,
        remedy=f"read samples of {policy}: train it longer if they are poor; if they are fine, mistrust the reward",
    )


def check_score_head(stage: str, norm: float | None, moved: float) -> Finding:
    """Whether the score weight is there and learned (R1).

    Args:
        norm: of the saved weight; None: it is not in the adapter.
        moved: its distance from the fresh weight that training began with.
    """
    lost = norm is None or norm == 0 or not math.isfinite(norm)
    unit = "no score weight in the adapter" if norm is None else "norm of the score weight"
    if not lost and moved == 0:
        unit += ", which is the untrained one"
    return judge(
        stage,
        "score head",
        math.nan if norm is None else norm,
        unit=unit,
        threshold="broken: absent, 0, not finite, or exactly the weight that training began with",
        broken=lost or moved == 0,
        remedy="run the stage again; save it with preftune (PEFT alone loses a score that is not in modules_to_save)",
    )


def check_reload(
    stage: str, logged: float, accuracy: float, interval: tuple[float, float], *, n: int, all_: bool
) -> Finding:
    """The accuracy that the stage logged against that of the adapter as it lies there.

    Args:
        accuracy, interval: measured now on n pairs.
        all_: n are all pairs that the stage measured on; else the logged rate need only lie in the interval.
    """
    gap = abs(logged - accuracy)
    # one near-tie in few pairs is a large share of them
    look, broken = (max(ACCURACY_LOOK, 1.5 / n), max(ACCURACY_BROKEN, 3.5 / n)) if all_ else (math.inf, math.inf)
    outside = not all_ and not interval[0] <= logged <= interval[1]
    return judge(
        stage,
        "score reload, accuracy",
        gap,
        unit=f"between the accuracy logged ({logged:.4g}) and measured now ({accuracy:.4g}) on {n} pairs",
        threshold=f"look: above {look:.3g}; broken: above {broken:.3g}" if all_ else "look: outside the interval",
        broken=gap > broken,
        look=gap > look or outside,
        remedy="the saved adapter is not what was measured in training: run the stage again",
    )


def check_reload_mean(stage: str, logged: dict[str, float], mean: float, n: int) -> Finding:
    """The mean score on the reference replies, as lineage.json has it and as measured now; sharper than accuracy."""
    gap = abs(mean - logged["mean"]) / logged["std"]
    return judge(
        stage,
        "score reload, mean",
        gap,
        unit=f"deviations between the mean score logged ({logged['mean']:.4g}) and now ({mean:.4g}), {n} replies",
        threshold=f"look: above {MEAN_LOOK}; broken: above {MEAN_BROKEN}",
        broken=not gap <= MEAN_BROKEN,
        look=gap > MEAN_LOOK,
        remedy="the saved adapter is not what was measured in training: run the stage again",
    )
