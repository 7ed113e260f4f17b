"""What a stage without `from:` starts from: the chain's SFT stage, never in silence the base beside it."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..stages.kinds import stage_kind
from .problems import problem
from .schema import BASE
from .text import Text


def settle_parents(text: Text) -> list[UserError]:
    """Write the parent of every stage that names none into the file's values, where the chain leaves no doubt.

    A stage starts from the one SFT stage that there is, an SFT stage without another one beside it from the base. The
    kinds of all stages stand in the values already.

    Returns:
        A problem for each stage of which the chain does not say where it starts.
    """
    stages = text.values.get("stages")
    named = {str(name): stage for name, stage in stages.items()} if isinstance(stages, dict) else {}
    sound = {name: stage for name, stage in named.items() if isinstance(stage, dict) and isinstance(stage["kind"], str)}
    found: list[UserError] = []
    # the SFT stages last: where one starts may depend on what the others come from
    for name, stage in sorted(sound.items(), key=lambda item: stage_kind(item[1]["kind"]).first):
        if stage.get("from") is not None:
            continue
        candidates = [
            each
            for each, other in sound.items()
            if each != name and stage_kind(other["kind"]).first and not _descends(sound, each, name)
        ]
        if not candidates or (len(candidates) == 1 and not stage_kind(stage["kind"]).first):
            stage["from"] = candidates[0] if candidates else BASE
            continue
        there = f"there are the SFT stages {', '.join(candidates)}"
        said = f"does not say where it starts, and {there if len(candidates) > 1 else f'there is {candidates[0]} too'}"
        found.append(
            problem(
                text, ("stages", name), said, f"write {' or '.join(f'from: {each}' for each in (*candidates, BASE))}"
            )
        )
    return found


def _descends(stages: Mapping[str, dict[str, Any]], name: str, ancestor: str) -> bool:
    """Whether a stage comes, by what the file says, from another one."""
    seen = set()
    while name in stages and name not in seen:
        seen.add(name)
        if name == ancestor:
            return True
        name = str(stages[name].get("from"))
    return False
