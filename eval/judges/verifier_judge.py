"""A verifier as a judge: `{kind: verifier, check: numeric, column: answer}` (`stages/scorers/verifiers.py`)."""

from pathlib import Path
from typing import Any

from ...stages.scorers.replies import Failures
from ...stages.scorers.verifiers import VerifierScorer, parse_verifier
from .judge import JudgePlan
from .names import judge_name
from .text_judge import TextJudge


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry: `check`, and the fields of that check.

    Raises:
        UserError: an unknown check, or a field that it does not take, lacks, or cannot use.
    """
    del run_dir
    fields = {key: value for key, value in entry.items() if key not in ("kind", "name")}
    verifier = parse_verifier(fields, where)
    judge = TextJudge(judge_name(entry), VerifierScorer(verifier, Failures(where)))
    return JudgePlan(judge.name, lambda adapters, tokenizer: judge, verifier.try_out)
