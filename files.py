"""Files and folders that appear whole or not at all, and the names of those that a run consists of."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECIPE, RUN_STATE, REPORT, DOCTOR = "recipe.yaml", "run.json", "report.html", "doctor.json"
"""In a run's folder."""

METRICS, LOG, LINEAGE, CHECKPOINTS, LOGS = "metrics.json", "log.jsonl", "lineage.json", "checkpoints", "logs"
"""In a stage's folder, beside its adapter; `logs` holds what trackers write (`report_to`)."""

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's own names: an adapter lies directly in its stage's folder."""

EVALUATION, RESULTS, SAMPLES, REWARDS, OVER_OPTIMISATION = (
    "eval",
    "results.json",
    "samples.jsonl",
    "rewards.json",
    "overoptimisation.json",
)
"""The evaluation's folder in that of the run, and what lies in it."""

EVAL_CACHE = "eval-cache"
"""Beside it: what an evaluation need not ask or draw again."""


def partial_folder(run_dir: Path, stage: str) -> Path:
    """Where a stage of a run is written until it is finished, and lies after it was interrupted."""
    return run_dir / f".{stage}.partial"


def write_whole(file: Path, text: str) -> Path:
    """Write a text file so that a reader sees the old content or the new one, never half; returns its path."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        return beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Generator[Path]:
    """An empty folder to fill; when the block ends well it takes the place of `final`, and an older one goes then.

    Where the block raises, `final` stays as it was.
    """
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        replace_folder(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(new: Path, final: Path) -> None:
    """Move a finished folder to its place beside it; an older one there goes only then."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacing(parent: Path) -> None:
    """Put right what a crash in `replace_folder` left behind: the older folder comes back unless the new one is there.

    Args:
        parent: the folder that they lie in; nobody else may be replacing folders in it.
    """
    for old in parent.glob(".*.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        shutil.rmtree(old) if final.exists() else old.rename(final)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. A line that a kill cut off is left out.

    Not `splitlines`: a text may hold other line ends, which JSON does not escape.
    """
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
