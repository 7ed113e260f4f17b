"""What a recipe's judges are called, known before anything is read or imported (`registry.plan_judges` opens them)."""

import math
from collections.abc import Sequence

from .kinds import KINDS, Entry


def judge_name(judge: Entry) -> str:
    """The name it has, or the one that its kind gives it."""
    kind = KINDS.get(str(judge.get("kind")))
    return str(judge.get("name") or (None if kind is None else kind.called(judge)))


def only_compares(judge: Entry) -> bool:
    """Whether it says which of two replies is better and has no score for one."""
    kind = KINDS.get(str(judge.get("kind")))
    return kind is not None and kind.only_compares(judge)


def score_bounds(judge: Entry) -> tuple[float, float]:
    """The lowest and the highest score that it can give, infinite where nothing bounds it."""
    kind = KINDS.get(str(judge.get("kind")))
    return (-math.inf, math.inf) if kind is None else kind.bounds(judge)


def scoring_judges(judges: Sequence[Entry]) -> list[str]:
    """The names of those that score."""
    return [judge_name(judge) for judge in judges if not only_compares(judge)]
