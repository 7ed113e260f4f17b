"""The kinds of judges, one record each: a new judge is a file beside this one and a record here. Imports no torch.

A recipe lists judges as mappings (*entries*) with a `kind`, the fields of that kind and an optional `name`.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...stages.scorers.kinds import KINDS as SCORERS

if TYPE_CHECKING:
    from .judge import JudgePlan

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class JudgeKind:
    """What a recipe may say of one kind of judge, and where its code stands.

    Attributes:
        name: its `kind` in a recipe.
        fields: what an entry may have besides `kind` and `name`.
        module: the file beside this one; it has `plan(entry, where, run_dir)`, which checks an entry and returns the
            `JudgePlan`, and where `fingerprinted` is True `key_parts(entry, run_dir)`.
        called: the name of a judge whose entry has none.
        only_compares: whether such a judge says which of two replies is better and has no score for one.
        bounds: the lowest and the highest score that it can give.
        fingerprinted: whether its verdicts depend on files or code besides its words in the recipe.
    """

    name: str
    fields: tuple[str, ...]
    module: str
    called: Callable[[Entry], object]
    only_compares: Callable[[Entry], bool] = lambda entry: False
    bounds: Callable[[Entry], tuple[float, float]] = lambda entry: (-math.inf, math.inf)
    fingerprinted: bool = False

    def plan(self, entry: dict[str, Any], where: str, run_dir: Path | None) -> "JudgePlan":
        """Checks an entry whose fields are known ones; `where` is its place in the recipe."""
        return self._module().plan(entry, where, run_dir)

    def key_parts(self, entry: Entry, run_dir: Path) -> dict[str, str | None]:
        """Name -> hash of what the judge's verdicts depend on besides its words in the recipe."""
        return self._module().key_parts(entry, run_dir) if self.fingerprinted else {}

    def _module(self) -> Any:
        return importlib.import_module(f".{self.module}", __package__)


def _scoring(name: str, *, fingerprinted: bool = False, **more: Any) -> JudgeKind:
    """A judge that is a source of scores as well, as a stage trains on it."""
    kind = SCORERS[name]
    lowest_highest = kind.bounds
    return JudgeKind(
        name,
        kind.fields,
        f"{name}_judge",
        called=kind.called,
        bounds=lambda entry: lowest_highest,
        fingerprinted=fingerprinted,
        **more,
    )


KINDS: dict[str, JudgeKind] = {
    kind.name: kind
    for kind in (
        _scoring("rubric"),
        _scoring("verifier"),
        _scoring("reward", fingerprinted=True),
        _scoring("function", fingerprinted=True),
        JudgeKind(
            "human",
            ("votes",),
            "human_judge",
            called=lambda entry: "human",
            only_compares=lambda entry: True,
            fingerprinted=True,
        ),
        _scoring("model", fingerprinted=True),
        _scoring("http"),
        _scoring("endpoint", only_compares=lambda entry: entry.get("mode", "pairwise") == "pairwise"),
    )
}


def judge_parts(entry: Entry, run_dir: Path) -> dict[str, str | None]:
    """What belongs into the evaluation's cache key for a judge besides its words in the recipe; `{}` for unknown kinds.

    Args:
        run_dir: the run folder, in which files that the entry names are looked up first.
    """
    kind = KINDS.get(str(entry.get("kind")))
    return {} if kind is None else kind.key_parts(entry, run_dir)
