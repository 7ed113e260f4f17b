"""Judges that are one of the run's own models, or the base under its policies: they tend to like what is like them.

Imports no torch: the report says it of recipes whose models are long gone.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from .kinds import Entry
from .names import judge_name

_TRAINS_ON = "the policies of {} were trained to please it, so that its word on them is no measurement"
_LIKES_ITSELF = "models prefer what sounds like themselves"


def self_preference(
    judge: Entry, *, base: str, stages: Collection[str], pleased: Mapping[str, str], run_dir: Path
) -> str | None:
    """In which way a judge is not a stranger to what it judges, in a sentence; None where it seems to be one.

    Args:
        base: the base's spec in the recipe.
        stages: the recipe's stages.
        pleased: reward stage -> the stage that trains on its scores.
        run_dir: the run's folder.
    """
    name, kind = judge_name(judge), judge.get("kind")
    model = str(judge.get("stage") or judge.get("adapter") or judge.get("model") or "")
    if kind not in ("reward", "model", "endpoint") or not model:
        return None
    stage = _stage_of(model, stages, run_dir)
    if kind == "reward" and stage is not None and stage in pleased:
        return f"{name} is this run's own reward model: {_TRAINS_ON.format(pleased[stage])}."
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
