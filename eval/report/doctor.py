"""What `preftune doctor` found."""

import math
from collections.abc import Mapping
from typing import Any

from ...models.fingerprints import content
from ..doctor.finding import Finding
from .read import Run, number
from .text import listed

LEVELS = ("broken", "look", "OK")


def findings(run: Run) -> list[Finding]:
    """The findings of doctor.json; a number that was not finite is nan again."""
    return [_finding(row) for row in (run.doctor or {}).get("findings") or [] if isinstance(row, Mapping)]


def by_stage(run: Run) -> list[dict[str, Any]]:
    """Stage by stage: what is broken or needs a look in front, and what is well."""
    groups: dict[str, list[Finding]] = {}
    for each in findings(run):
        groups.setdefault(each.stage, []).append(each)
    return [
        {
            "stage": stage,
            "level": _worst_level(group),
            "bad": sorted((f for f in group if f.level != "OK"), key=lambda f: LEVELS.index(f.level)),
            "good": [f for f in group if f.level == "OK"],
        }
        for stage, group in groups.items()
    ]


def counted(run: Run) -> str:
    """ "2 broken, 1 to look at, 4 OK"."""
    found = findings(run)
    names = {"broken": "broken", "look": "to look at", "OK": "OK"}
    return (
        ", ".join(f"{n} {names[level]}" for level in LEVELS if (n := sum(f.level == level for f in found)))
        or "No check."
    )


def stale(run: Run) -> list[str]:
    """The stages whose adapter is no longer the one that the doctor looked at."""
    looked = {each.stage: each.adapter for each in findings(run) if each.adapter is not None}
    folders = {stage.name: stage.folder for stage in run.stages if stage.folder is not None}
    return [stage for stage, adapter in looked.items() if stage in folders and content(folders[stage]) != adapter]


def unexamined(run: Run) -> list[str]:
    """Finished stages of which the doctor says nothing: trained after it was there, or left out."""
    seen = {each.stage for each in findings(run)}
    return [stage.name for stage in run.stages if stage.state == "done" and stage.record and stage.name not in seen]


def gaps(run: Run) -> str:
    """What of the run no finding is about, in a sentence; empty where the doctor saw everything, or never was there."""
    if run.doctor is None:
        return ""
    left_out = len(run.doctor.get("left_out") or [])
    said = [f"{left_out} check{'s' if left_out > 1 else ''} could not be made"] if left_out else []
    if never := unexamined(run):
        said.append(f"{listed(never)} {'was' if len(never) == 1 else 'were'} not examined")
    if old := stale(run):
        said.append(f"{listed(old)} {'was' if len(old) == 1 else 'were'} trained again since")
    return f"Of the doctor's examination: {'; '.join(said)}." if said else ""


def worst(run: Run) -> str | None:
    """One sentence of the doctor's worst finding; None where no doctor was there."""
    found = findings(run)
    if run.doctor is None:
        return None
    counts = {level: sum(each.level == level for each in found) for level in LEVELS}
    first = next((each for level in LEVELS[:2] for each in found if each.level == level), None)
    if first is None:
        return f"The doctor found nothing wrong in {counts['OK']} checks."
    said = "is broken" if first.level == "broken" else "needs a look"
    more = counts["broken"] + counts["look"] - 1
    others = f"; {more} more below" if more else ""
    return f"The doctor's worst finding: {first.stage} {said}, {first.check} {first.number()}{others}."


def _worst_level(group: list[Finding]) -> str:
    return next(level for level in LEVELS if any(each.level == level for each in group))


def _finding(row: Mapping[str, Any]) -> Finding:
    measured = number(row.get("measured"))
    level = row.get("level")
    return Finding(
        stage=str(row.get("stage")),
        check=str(row.get("check")),
        level=level if level in LEVELS else "look",
        measured=math.nan if measured is None else measured,
        unit=str(row.get("unit") or ""),
        threshold=str(row.get("threshold") or ""),
        remedy=str(row.get("remedy") or ""),
        low=number(row.get("low")),
        high=number(row.get("high")),
        adapter=str(row["adapter"]) if row.get("adapter") else None,
    )
