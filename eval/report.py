"""The report of a run: one self-contained page, made from what lies in the run folder."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment

from ..data.errors import UserError
from . import svg
from .verdicts import LENGTH_CONTROL_PROMPTS

SAMPLE_PROMPTS = 20
CURVES = 12
# The curves that matter come first; whatever else was logged follows in its own order.
_FIRST = ("loss", "eval_loss", "objective/rlhf_reward", "objective/scores", "objective/kl", "rewards/margins")
_BOOKKEEPING = ("step", "epoch", "total_flos", "num_tokens", "num_input_tokens_seen", "episode")
_BOOKKEEPING_ENDINGS = ("_runtime", "_per_second", "_seconds")


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from whatever the run folder holds so far, and returns its path.

    Raises:
        UserError: the folder holds neither a stage nor an evaluation.
    """
    run_dir = Path(run_dir)
    stages = [read_stage(folder) for folder in stage_folders(run_dir)]
    results = _read_json(run_dir / "eval" / "results.json") or []
    if not stages and not results:
        raise UserError(str(run_dir), "holds no stage and no evaluation", "give the folder of a run (runs/NAME)")
    environment = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(short=svg.short, seconds=_seconds, bytes=_bytes)
    template = Path(__file__).with_name("templates").joinpath("report.html.j2").read_text(encoding="utf-8")
    recipe = run_dir / "recipe.yaml"
    page = environment.from_string(template).render(
        name=run_dir.resolve().name,
        results=[_result(row) for row in results],
        controlled=any(row.get("length_controlled_win_rate") is not None for row in results),
        length_control_prompts=LENGTH_CONTROL_PROMPTS,
        matrices=_matrices(results),
        stages=stages,
        samples=read_samples(run_dir / "eval" / "samples.jsonl"),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        versions=next((stage["lineage"]["versions"] for stage in stages if stage["lineage"].get("versions")), {}),
    )
    beside = run_dir / f".report.html.{os.getpid()}"
    beside.write_text(page, encoding="utf-8")
    return beside.replace(run_dir / "report.html")


def stage_folders(run_dir: Path) -> list[Path]:
    """The run's stage folders in the order in which run.json lists them, others after them by time."""
    listed = list(((_read_json(run_dir / "run.json") or {}).get("stages") or {}).keys())
    found = [
        folder
        for folder in run_dir.iterdir()
        if folder.is_dir()
        and not folder.name.startswith(".")
        and folder.name != "eval"
        and any((folder / name).is_file() for name in ("metrics.json", "log.jsonl", "lineage.json"))
    ]
    place = {name: index for index, name in enumerate(listed)}
    return sorted(found, key=lambda folder: (place.get(folder.name, len(listed)), folder.stat().st_mtime))


def read_stage(folder: Path) -> dict[str, Any]:
    """What the page shows of a stage: name, metrics, curves (title, figure, last value), lineage."""
    metrics = _read_json(folder / "metrics.json") or {}
    lineage = _read_json(folder / "lineage.json") or {}
    curves = [
        {"title": key, "figure": svg.curve(steps, values, key), "last": values[-1]}
        for key, (steps, values) in read_curves(folder / "log.jsonl").items()
    ]
    return {
        "name": folder.name,
        "kind": lineage.get("kind", ""),
        "metrics": {key: value for key, value in metrics.items() if isinstance(value, int | float)},
        "curves": curves[:CURVES],
        "more_curves": curves[CURVES:],
        "lineage": lineage,
    }


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """key -> (steps, values) of every number that a stage logged at least twice, the telling ones first."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for place, line in enumerate(_read_lines(path)):
        step = line.get("step", place)
        for key, value in line.items():
            if key in _BOOKKEEPING or key.startswith("train_") or key.endswith(_BOOKKEEPING_ENDINGS):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            steps, values = series.setdefault(key, ([], []))
            steps.append(float(step))
            values.append(float(value))
    order = {key: place for place, key in enumerate(_FIRST)}
    keys = sorted((key for key in series if len(series[key][0]) > 1), key=lambda key: order.get(key, len(order)))
    return {key: series[key] for key in keys}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The first prompts with every policy's reply: [{prompt: messages, replies: [sample]}]."""
    prompts: dict[int, dict[str, Any]] = {}
    for line in _read_lines(path):
        index = line["prompt_index"]
        if index < SAMPLE_PROMPTS:
            prompts.setdefault(index, {"prompt": line["prompt"], "replies": []})["replies"].append(line)
    return [prompts[index] for index in sorted(prompts)]


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    rate, low, high = row["win_rate"], row["ci_low"], row["ci_high"]
    return {**row, "bar": "" if rate is None or low is None or high is None else svg.interval_bar(rate, low, high)}


def _matrices(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(judge, its rows) of every judge that compared more than two policies; two are a pair, and stand above."""
    judges = list(dict.fromkeys(row["judge"] for row in results if row.get("against")))
    tables = [(judge, [row for row in results if row["judge"] == judge]) for judge in judges]
    return [(judge, table) for judge, table in tables if len(table) > 2]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s"
    )


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
