"""What stages that sample drew, and some of the rows that they kept."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ...files import ROWS
from .read import Run, StageRecord, number

SHOWN = 3
"""Rows of a stage on the page."""
_CUT = 1_200
"""Characters of a text."""


def sampled_rows(run: Run) -> dict[str, Any] | None:
    """A line of numbers for each stage that sampled rows, and the first rows of each; None where none did."""
    stages = [stage for stage in run.stages if not stage.trains and number(stage.metrics.get("rows")) is not None]
    if not stages:
        return None
    return {
        "stages": [_line(stage) for stage in stages],
        "shown": [{"stage": stage.name, "rows": [*_shown(stage)]} for stage in stages],
    }


def _line(stage: StageRecord) -> dict[str, Any]:
    metrics = stage.metrics
    names = ("prompts", "replies", "rows", "score", "length", "eos_rate", "score_rejected", "length_rejected")
    found: dict[str, Any] = {name: number(metrics.get(name)) for name in names}
    for name in ("score", "length"):
        found[f"{name}_kept"] = number(metrics.get(f"{name}_chosen", metrics.get(f"{name}_kept")))
    left_out = metrics.get("left_out")
    counts = left_out.items() if isinstance(left_out, Mapping) else ()
    return {"stage": stage.name, **found, "left_out": ", ".join(f"{count} {reason}" for reason, count in counts)}


def _shown(stage: StageRecord) -> Iterator[dict[str, Any]]:
    """The first rows: the prompt's messages, and what was kept of the replies."""
    for row in _first_rows(stage.folder / ROWS) if stage.folder is not None else ():
        sides = [
            {"side": side, "text": _text(row.get(side)), "score": number(row.get(score))}
            for side, score in (("chosen", "score_chosen"), ("rejected", "score_rejected"), ("completion", "score"))
            if row.get(side)
        ]
        prompt = row.get("prompt")
        messages = prompt if isinstance(prompt, list) else []
        said = [{"role": each.get("role"), "content": _cut(each.get("content"))} for each in messages]
        yield {"prompt": said, "sides": sides}


def _first_rows(file: Path) -> list[dict[str, Any]]:
    """None where the file is not there, or damaged."""
    try:
        with file.open(encoding="utf-8") as lines:
            return [row for row in map(json.loads, islice(lines, SHOWN)) if isinstance(row, dict)]
    except (OSError, ValueError, RecursionError):
        return []


def _text(messages: Any) -> str:
    contents = (
        [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    )
    return _cut("\n".join(map(str, contents)))


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _CUT else f"{text[:_CUT]}… [{len(text) - _CUT} more characters]"
