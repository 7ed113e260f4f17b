"""Judges that are no strangers to what they judge: what a policy was trained to please, one of the run's own models, or
the base under its policies, which tend to like what is like them.

Imports no torch: the report says it of recipes whose models are long gone.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...stages.scorers.kinds import KINDS as SCORERS
from ...stages.scorers.kinds import entry_kind
from .kinds import Entry
from .names import judge_name

_TRAINS_ON = "the policies of {} were trained to please it, so that its word on them is no measurement"
_REWARDS = "a policy may have learnt to please it alone, so that it is no independent judge"
_LIKES_ITSELF = "models prefer what sounds like themselves"


def self_judged(plan: Mapping[str, Any], policies: Collection[str], run_dir: Path) -> dict[str, str]:
    """Judge -> a sentence on what it has to do with what it judges, of those that are no strangers to it.

    Args:
        plan: the run's recipe as plain values.
        policies: the evaluated ones.
        run_dir: the run's folder.
    """
    base = str(_mapping(plan.get("model")).get("base") or "")
    stages = _mapping(plan.get("stages"))
    found: dict[str, str | None] = {}
    for judge in _mapping(plan.get("eval")).get("judges") or ():
        if isinstance(judge, Mapping):
            pleasing = [each for each in trained_on(judge, plan, run_dir) if each in policies]
            said = self_preference(judge, base=base, stages=list(stages), pleasing=pleasing, run_dir=run_dir)
            found[judge_name(judge)] = said
    return {judge: said for judge, said in found.items() if said is not None}


def trained_on(judge: Entry, plan: Mapping[str, Any], run_dir: Path) -> list[str]:
    """The stages whose models learnt from this very source of scores, in the recipe's order: its words stand in their
    `reward:`, in that of the stage that sampled their rows, or in one of those that they started from."""
    stages = {name: _mapping(stage) for name, stage in _mapping(plan.get("stages")).items()}
    data, words = _mapping(plan.get("data")), _words(judge, stages, run_dir)
    if words is None:
        return []
    asking = {name for name, stage in stages.items() if words in [*_rewards(stage, stages, run_dir)]}
    found: set[str] = set()
    while True:
        more = {
            name
            for name, stage in stages.items()
            if stage.get("kind") != "sample"
            and (name in asking or stage.get("from") in found or _rows_of(stage, data) in asking)
        }
        if more == found:
            return [name for name in stages if name in found]
        found = more


def _rewards(stage: Mapping[str, Any], stages: Collection[str], run_dir: Path) -> Iterator[tuple[str, Any] | None]:
    given = stage.get("reward")
    for each in given if isinstance(given, list) else [given]:
        entry = {"stage": each} if isinstance(each, str) else each
        if isinstance(entry, Mapping):
            yield _words({key: value for key, value in entry.items() if key != "on_failure"}, stages, run_dir)


def _words(entry: Entry, stages: Collection[str], run_dir: Path) -> tuple[str, Any] | None:
    """What of a source's words its scores depend on; None of a kind that nobody trains on."""
    kind = SCORERS.get(entry_kind(entry) or "")
    if kind is None:
        return None
    # whether a chat model compares or rates, it is the same judge
    other = ("kind", "name", "weight", "mode")
    said = {key: value for key, value in kind.counted(entry).items() if key not in other and value is not None}
    stage = _stage_of(str(said.get("adapter") or ""), stages, run_dir) if kind.name == "reward" else None
    return kind.name, said if stage is None else {"stage": stage}


def _rows_of(stage: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """The stage that sampled the rows which this one reads."""
    named = stage.get("data")
    entry = named if isinstance(named, Mapping) else data.get(str(named))
    sampled = _mapping(entry).get("stage")
    return sampled if isinstance(sampled, str) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def self_preference(
    judge: Entry, *, base: str, stages: Collection[str], pleasing: Sequence[str], run_dir: Path
) -> str | None:
    """In which way a judge is not a stranger to what it judges, in a sentence; None where it seems to be one.

    Args:
        base: the base's spec in the recipe.
        stages: the recipe's stages.
        pleasing: the evaluated policies that learnt from its scores.
        run_dir: the run's folder.
    """
    name, kind = judge_name(judge), judge.get("kind")
    model = str(judge.get("stage") or judge.get("adapter") or judge.get("model") or "")
    stage = _stage_of(model, stages, run_dir) if model else None
    if pleasing and kind == "reward" and stage is not None:
        return f"{name} is this run's own reward model: {_TRAINS_ON.format(', '.join(pleasing))}."
    if pleasing:
        return f"{name} is word for word a reward that {', '.join(pleasing)} learnt from: {_REWARDS}."
    if kind not in ("reward", "model", "endpoint") or not model:
        return None
    if stage is not None:
        return f"{name} is one of this run's own models ({stage}): {_LIKES_ITSELF}."
    if kind != "reward" and _same_model(model, base):
        return f"{name} is the base of these policies ({base}): {_LIKES_ITSELF}."
    return None


def _stage_of(named: str, stages: Collection[str], run_dir: Path) -> str | None:
    """The stage that a name or folder means; a server calls an adapter by the name or path that it was started with."""
    if named in stages:
        return named
    given = Path(named).expanduser()
    for place in (given, run_dir / given):
        folder = place.resolve()
        inside = folder.is_relative_to(run_dir.resolve()) and folder != run_dir.resolve()
        if inside and (first := folder.relative_to(run_dir.resolve()).parts[0]) in stages:
            return first
    return next((stage for stage in stages if given.parts[-2:] == (run_dir.name, stage)), None)


def _same_model(model: str, base: str) -> bool:
    """Whether two names mean one model: servers leave out the owner, and file endings."""
    ours, theirs = (_plain_name(each) for each in (base, model))
    return bool(ours) and ours == theirs


def _plain_name(spec: str) -> str:
    name = spec.split(":", 1)[1] if spec.startswith(("pypi:", "hf:")) else spec
    name = name.split("==")[0].rstrip("/").rsplit("/", 1)[-1].lower()
    return name.removesuffix(".gguf").removesuffix(":latest").replace("_", "-")
