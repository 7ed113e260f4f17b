"""What a judge says of every pair of policies, and the columns of results.json that follow from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..results import AgainstOther, VerdictColumns
from ..samples import Sample
from ..statistics.length_control import control_length
from ..statistics.ratings import rate_policies
from ..statistics.winrate import WinRate, against_itself, score_outcomes, win_rate
from .judge import CheckingJudge, Judge, PairJudge, asked

# Fewer judged prompts than this say too little about the effect of length to take it out.
LENGTH_CONTROL_PROMPTS = 50
COLUMNS = tuple(VerdictColumns.__annotations__)


@dataclass(frozen=True)
class Verdicts:
    """One judge on all policies.

    Attributes:
        scores: policy -> one score per prompt; empty for a judge that compares.
        outcomes: (policy, other) -> [N] outcomes of the policy, for every two policies in both orders.
    """

    scores: dict[str, list[float]]
    outcomes: dict[tuple[str, str], np.ndarray]

    @classmethod
    def of(cls, judge: Judge | PairJudge, samples: Mapping[str, list[Sample]]) -> "Verdicts":
        """Asks the judge. Every policy's samples answer the same prompts in the same order."""
        return asked(judge, lambda: cls._heard(judge, samples))

    @classmethod
    def _heard(cls, judge: Judge | PairJudge, samples: Mapping[str, list[Sample]]) -> "Verdicts":
        pairs = [(ours, theirs) for ours in samples for theirs in samples if ours != theirs]
        if isinstance(judge, CheckingJudge):
            judge.check(samples)
        if isinstance(judge, PairJudge):
            compared = {(a, b): np.array(judge.compare(samples[a], samples[b])) for a, b in pairs}
            return cls({}, compared)
        scores = _once({policy: judge.score(replies) for policy, replies in samples.items()}, samples)
        return cls(scores, {(a, b): score_outcomes(scores[a], scores[b]) for a, b in pairs})


def _once(scores: Mapping[str, list[float]], samples: Mapping[str, list[Sample]]) -> dict[str, list[float]]:
    """The scores, of a reply that several policies give to a prompt the first one's: against itself it is a tie. In 16
    bits a model's two scores of it differ with the batches that they were computed in."""
    known: dict[tuple[int, str, tuple[int, ...]], float] = {}
    return {
        policy: [
            known.setdefault((place, reply.completion, tuple(reply.tokens)), score)
            for place, (reply, score) in enumerate(zip(replies, scores[policy], strict=True))
        ]
        for policy, replies in samples.items()
    }


def verdict_columns(
    verdicts: Verdicts, lengths: Mapping[str, Sequence[int]], reference: str, seed: int
) -> dict[str, VerdictColumns]:
    """policy -> its columns; nan where there is nothing to say.

    Args:
        lengths: policy -> length of each of its replies, for the length control. Its order is that of the policies.

    `against` is the policy's row of the matrix of all pairs: other policy -> win_rate, ci_low, ci_high, n.
    """
    policies = list(lengths)
    ratings = rate_policies(policies, verdicts.outcomes, seed=seed)
    controlled = _length_controlled(verdicts, lengths, reference, seed)
    columns: dict[str, VerdictColumns] = {}
    for policy in policies:
        rates = {other: win_rate(verdicts.outcomes[policy, other], seed=seed) for other in policies if other != policy}
        rate = against_itself(len(lengths[policy])) if policy == reference else rates[reference]
        rating = ratings[policy]
        columns[policy] = VerdictColumns(
            n=rate.n,
            mean_score=_mean(verdicts.scores.get(policy, ())),
            win_rate=rate.win_rate,
            ci_low=rate.ci_low,
            ci_high=rate.ci_high,
            ties=rate.ties,
            unparsable=rate.unparsable,
            length_controlled_win_rate=0.5 if policy == reference else controlled.get(policy, math.nan),
            rating_log_odds=rating.log_odds,
            rating_low=rating.low,
            rating_high=rating.high,
            against={other: _cell(each) for other, each in rates.items()},
        )
    return columns


def _length_controlled(
    verdicts: Verdicts, lengths: Mapping[str, Sequence[int]], reference: str, seed: int
) -> dict[str, float]:
    """policy -> length-controlled win-rate against the reference, of those with enough judged prompts."""
    outcomes = {policy: verdicts.outcomes[policy, reference] for policy in lengths if policy != reference}
    enough = [p for p, each in outcomes.items() if np.count_nonzero(~np.isnan(each)) >= LENGTH_CONTROL_PROMPTS]
    if not enough:
        return {}
    base = np.asarray(lengths[reference], dtype=np.float64)
    differences = [np.asarray(lengths[policy], dtype=np.float64) - base for policy in enough]
    rates = control_length([outcomes[p] for p in enough], differences, [range(len(base))] * len(enough), seed)
    return dict(zip(enough, rates, strict=True))


def _cell(rate: WinRate) -> AgainstOther:
    return AgainstOther(win_rate=rate.win_rate, ci_low=rate.ci_low, ci_high=rate.ci_high, n=rate.n)


def _mean(scores: Sequence[float]) -> float:
    array = np.asarray(scores, dtype=np.float64)
    return float(np.nanmean(array)) if np.count_nonzero(~np.isnan(array)) else math.nan
