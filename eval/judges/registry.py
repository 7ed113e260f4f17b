"""From a recipe's list of judges to judges: checked before any model is loaded, opened once the base is there.

People, and an endpoint asked to, compare two replies; all other judges score one at a time, so that the order of two
replies cannot matter. A model that reads both at once is asked in both orders (see `winrate.order_outcomes`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, gathering, raise_found
from .judge import JudgePlan
from .kinds import KINDS

_TEXT = ("name", "stage", "adapter", "function", "votes")
"""Fields that hold text in every kind of judge; the kinds check their own."""


def plan_judges(raw: Sequence[Mapping[str, Any]], run_dir: Path | None, where: str = "eval.judges") -> list[JudgePlan]:
    """Checks a recipe's judges.

    Args:
        raw: mappings such as `{kind: rubric, checks: [...]}`, each with the fields of its kind (see `kinds.py` and the
            kind's own file) and an optional `name`.
        run_dir: the run folder, in which a reward judge's stage is looked up, and a file of votes or a model's folder
            before they are looked up from here; an endpoint's answers are kept in it.

    Raises:
        UserError: for an unknown kind, a missing or unknown field, a name given twice.
    """
    plans, found = list[JudgePlan](), list[UserError]()
    for place, entry in enumerate(raw):
        with gathering(found):
            plans.append(_plan(dict(entry), f"{where}[{place}]", run_dir))
    raise_found(found)
    names = [plan.name for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(where, f"two judges are called {twice!r}", "give each judge its own name")
    return plans


def _plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    name = entry.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UserError(where, f"kind is {name!r}, expected one of {', '.join(KINDS)}", "correct the kind")
    for key, value in entry.items():
        if key not in {"kind", "name", *kind.fields}:
            raise UserError(where, f"a {name} judge takes no {key!r}", f"it takes name, {', '.join(kind.fields)}")
        if key in _TEXT and not (isinstance(value, str | None) and value != ""):
            raise UserError(f"{where}.{key}", f"is {value!r}, expected text", "correct the value, or quote it")
    return kind.plan({key: each for key, each in entry.items() if each is not None}, where, run_dir)
