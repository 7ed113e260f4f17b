"""Standard benchmarks beside the base: what each policy has gained, and what was forgotten."""

from collections.abc import Mapping
from typing import Any

from ...models.fingerprints import content
from .read import Run, number


def benchmark_table(run: Run) -> dict[str, Any] | None:
    """A row for each task and metric, a cell for each policy; None where nothing was asked."""
    rows = [row for row in run.benchmarks.get("rows") or () if isinstance(row, Mapping) and "task" in row]
    if not rows:
        return None
    policies = [name for name in dict.fromkeys(row["policy"] for row in rows) if name != "base"]
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        place = (str(row["task"]), str(row["metric"]), str(row.get("filter", "")))
        entry = table.setdefault(place, {"task": place[0], "metric": place[1], "filter": place[2], "cells": {}})
        entry["cells"][row["policy"]] = _cell(row)
        entry |= {"n": row.get("n"), "lower": row.get("higher_is_better") is False}
    lines = [
        {**entry, "base": cells.get("base"), "cells": [cells.get(policy) for policy in policies]}
        for entry in table.values()
        for cells in [entry["cells"]]
    ]
    settings = run.benchmarks.get("settings") or {}
    return {
        "policies": policies,
        "rows": lines,
        "stale": _stale(run),
        "limit": settings.get("limit"),
        "lm_eval": run.benchmarks.get("lm_eval"),
        "unpaired": any(cell and not cell["paired"] for line in lines for cell in line["cells"]),
        "cut": max((int(number(row.get("cut")) or 0) for row in rows), default=0),
    }


def _cell(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = number(row.get("difference_low")), number(row.get("difference_high"))
    decided = low is not None and high is not None and (low > 0 or high < 0)
    sign = ""
    if decided and low is not None and row.get("higher_is_better") is not None:
        sign = "gained" if (low > 0) is bool(row["higher_is_better"]) else "lost"
    return {
        **{key: number(row.get(key)) for key in ("value", "stderr", "difference", "difference_se")},
        **{"low": low, "high": high, "sign": sign, "paired": bool(row.get("paired"))},
    }


def _stale(run: Run) -> list[str]:
    """The policies whose adapter is no longer the one that was asked."""
    asked = run.benchmarks.get("policies") or {}
    folders = {stage.name: stage.folder for stage in run.stages if stage.folder is not None}
    return [
        name for name, adapter in asked.items() if adapter and name in folders and content(folders[name]) != adapter
    ]
