"""What a recipe's judges are called, known before anything is read or imported (`judges.plan_judges` opens them)."""

from collections.abc import Mapping, Sequence
from typing import Any

_DEFAULTS = {
    "rubric": lambda judge: "rubric",
    "human": lambda judge: "human",
    "reward": lambda judge: judge.get("stage", "reward"),
    "function": lambda judge: str(judge.get("function")).partition(":")[2],
    "model": lambda judge: judge.get("model"),
    "endpoint": lambda judge: judge.get("model"),
}


def judge_name(judge: Mapping[str, Any]) -> str:
    """The name it has, or the one that its kind gives it."""
    default = _DEFAULTS.get(str(judge.get("kind")), lambda judge: None)
    return str(judge.get("name") or default(judge))


def only_compares(judge: Mapping[str, Any]) -> bool:
    """Whether it says which of two replies is better and has no score for one."""
    kind = judge.get("kind")
    return kind == "human" or (kind == "endpoint" and judge.get("mode", "pairwise") == "pairwise")


def scoring_judges(judges: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of those that score."""
    return [judge_name(judge) for judge in judges if not only_compares(judge)]
