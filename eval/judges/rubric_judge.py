"""A rubric as a judge: `{kind: rubric, checks: [...]}` (`stages/scorers/rubric.py` has the checks)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stages.scorers.rubric import Rubric, parse_rubric
from ..samples import Sample
from .judge import JudgePlan
from .names import judge_name


@dataclass(frozen=True)
class RubricJudge:
    """The share of a rubric's checks that the reply's text passes, in [0, 1]."""

    name: str
    rubric: Rubric

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self.rubric.score(sample.completion) for sample in samples]


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry: `checks`.

    Raises:
        UserError: a malformed check.
    """
    del run_dir
    judge = RubricJudge(judge_name(entry), parse_rubric(entry.get("checks"), where))
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge, judge.rubric.try_out)
