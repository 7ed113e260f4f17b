"""What a run folder holds, read as it lies there."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...bounded_yaml import load_bounded
from ...errors import UserError
from ...files import (
    BENCHMARKS,
    CHECKPOINTS,
    DOCTOR,
    EVALUATION,
    LINEAGE,
    LOG,
    METRICS,
    OVER_OPTIMISATION,
    RECIPE,
    RESULTS,
    REWARDS,
    RUN_STATE,
    SAMPLES,
    partial_folder,
)
from ...intact import check_intact, read_json
from ...stages.kinds import KINDS, StageKind, stage_kind
from ...values import is_finite
from ..judges.names import judge_name, score_bounds

_STAGE_FILES = (METRICS, LOG, LINEAGE)
_NO_STAGES = (EVALUATION, CHECKPOINTS)


@dataclass(frozen=True)
class StageRecord:
    """One stage, finished, under way or only planned.

    Attributes:
        name: its name in the recipe; `kind`: that of its kind, empty where nothing says.
        record: of the kind; None where nobody knows it (any more).
        state: done, running, failed, or "not run" where only the recipe knows the stage.
        folder: where its files lie (the partial folder while it is under way); None: nowhere yet.
        parents: (name, whether the edge is that of a reward or a teacher) in order; "base" is the base. A stage whose
            rows it reads stands among them.
        log: the lines of log.jsonl.
    """

    name: str
    kind: str
    state: str
    folder: Path | None
    parents: tuple[tuple[str, bool], ...]
    lineage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()
    seconds: float | None = None
    record: StageKind | None = None

    @property
    def trains(self) -> bool:
        """Whether an adapter comes out of it; else rows do."""
        return self.record is None or self.record.trains


@dataclass(frozen=True)
class Run:
    """Everything that the report shows. What is not there is empty or None.

    Attributes:
        recipe: recipe.yaml as text, `plan` the same parsed.
        results: rows of eval/results.json; samples: lines of eval/samples.jsonl; rewards: rows of eval/rewards.json.
        overoptimisation: eval/overoptimisation.json; benchmarks: eval/benchmarks.json.
        doctor: doctor.json.
        folder: the run's; None for one that was made up.
    """

    name: str
    stages: tuple[StageRecord, ...]
    results: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    rewards: tuple[Mapping[str, Any], ...] = ()
    overoptimisation: Mapping[str, Any] | None = None
    benchmarks: Mapping[str, Any] = field(default_factory=dict)
    doctor: Mapping[str, Any] | None = None
    recipe: str | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def policies(self) -> list[str]:
        """The evaluated policies in their order; their place gives colour and marker everywhere on the page."""
        rows = [*self.results, *self.samples]
        return list(dict.fromkeys(row["policy"] for row in rows))

    def judges(self) -> list[str]:
        return list(dict.fromkeys(row["judge"] for row in self.results if row.get("judge")))

    def reference(self) -> str | None:
        return self.results[0].get("reference") if self.results else None

    def by_policy(self) -> dict[str, Mapping[str, Any]]:
        """policy -> its first row, for what is the same whoever judges (KL, length, endings)."""
        rows: dict[str, Mapping[str, Any]] = {}
        for row in self.results:
            rows.setdefault(row["policy"], row)
        return rows

    def bounds(self, judge: str) -> tuple[float, float]:
        """The lowest and the highest score that a judge can give, infinite where nothing bounds it."""
        for entry in _object(self.plan.get("eval")).get("judges") or []:
            if isinstance(entry, Mapping) and judge_name(entry) == judge:
                return score_bounds(entry)
        return -math.inf, math.inf

    def token_limit(self) -> int | None:
        """Where the evaluation cut a reply, as the recipe says it."""
        limit = (self.plan.get("eval") or {}).get("max_new_tokens")
        return limit if isinstance(limit, int) else None


def read_run(run_dir: Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: it holds neither a stage nor an evaluation; a JSON file in it cannot be read.
    """
    recipe = run_dir / RECIPE
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    plan = _plan(text)
    progress = _object(read_json(run_dir / RUN_STATE))
    stages = _read_stages(run_dir, plan, _object(progress.get("stages")))
    evaluation = run_dir / EVALUATION
    check_intact(evaluation)
    results = _policy_rows(_rows(read_json(evaluation / RESULTS)))
    benchmarks = _object(read_json(evaluation / BENCHMARKS))
    if not results and not benchmarks and not any(stage.folder for stage in stages):
        raise UserError(str(run_dir), "holds no stage and no evaluation", "give the folder of a run (runs/NAME)")
    machines = [progress.get("machine"), *(x.get("machine") for s in stages for x in (s.metrics, s.lineage))]
    return Run(
        name=str(plan.get("name") or run_dir.resolve().name),
        stages=tuple(stages),
        results=results,
        samples=_policy_rows(read_lines(evaluation / SAMPLES)),
        rewards=_rows(read_json(evaluation / REWARDS)),
        overoptimisation=_object(read_json(evaluation / OVER_OPTIMISATION)) or None,
        benchmarks=benchmarks,
        doctor=_object(read_json(run_dir / DOCTOR)) or None,
        recipe=text,
        plan=plan,
        folder=run_dir,
        machine=next((each for each in machines if isinstance(each, Mapping)), {}),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line that was being written when its writer died is left out.

    Raises:
        UserError: another line cannot be read.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if place == len(lines) - 1:
                break
            said = " ".join(str(error).split())[:120]
            raise UserError(f"{path}:{place + 1}", f"is not JSON ({said})", "delete the line, or the file") from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    return float(value) if is_finite(value) else None


def _read_stages(run_dir: Path, plan: Mapping[str, Any], progress: Mapping[str, Any]) -> list[StageRecord]:
    """In the order in which run.json lists them; then other folders by time; then what the recipe alone knows."""
    planned = {name: each for name, each in _object(plan.get("stages")).items() if isinstance(each, Mapping)}
    folders = {path.name: path for path in run_dir.iterdir() if _is_stage(path)}
    late = sorted((name for name in folders if name not in progress), key=lambda name: folders[name].stat().st_mtime)
    steps = [name for name in progress if name in folders or name in planned or name not in _NO_STAGES]
    names = list(dict.fromkeys([*steps, *late, *planned]))
    entries = _object(plan.get("data"))
    found = []
    for name in names:
        stage = planned.get(name, {})
        rows = _object(entries.get(str(stage.get("data")))).get("stage")
        rows_of = rows if isinstance(rows, str) else None
        found.append(_read_stage(run_dir, name, folders.get(name), stage, progress.get(name), rows_of))
    return found


def _is_stage(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name in _NO_STAGES
    return not hidden and path.is_dir() and any((path / name).is_file() for name in _STAGE_FILES)


def _read_stage(
    run_dir: Path, name: str, folder: Path | None, planned: Mapping[str, Any], step: Any, rows_of: str | None
) -> StageRecord:
    """Args: rows_of: the stage whose rows it reads, by the recipe."""
    entry = _object(step)
    partial = partial_folder(run_dir, name)
    if folder is None and partial.is_dir():
        folder = partial
    if folder is not None:
        check_intact(folder, (LINEAGE, METRICS))
    lineage = _object(read_json(folder / LINEAGE)) if folder else {}
    metrics = _object(read_json(folder / METRICS)) if folder else {}
    # the recipe names a method outside the package by its file, the lineage by its name
    own = _known_kind(str(planned["kind"])) if planned.get("kind") else None
    # a folder's files name no code: only the recipe does
    record = own or next((KINDS[word] for word in (str(lineage.get("kind")), name) if word in KINDS), None)
    return StageRecord(
        name=name,
        kind=str(lineage.get("kind") or (record.name if record is not None else planned.get("kind") or "")),
        record=record,
        state=str(entry.get("state") or ("done" if folder is not None and folder != partial else "not run")),
        folder=folder,
        parents=(*_parents(record, lineage, planned), *(() if rows_of is None else ((rows_of, False),))),
        lineage=lineage,
        metrics=metrics,
        log=tuple(read_lines(folder / LOG)) if folder else (),
        seconds=number(metrics.get("train_seconds")) or number(lineage.get("seconds")) or number(entry.get("seconds")),
    )


def _known_kind(word: str) -> StageKind | None:
    try:
        return stage_kind(word)
    except UserError:
        return None  # the method's file is gone: the rest of the report is worth having


def _parents(
    kind: StageKind | None, lineage: Mapping[str, Any], planned: Mapping[str, Any]
) -> tuple[tuple[str, bool], ...]:
    """From the lineage, else from the recipe. Only the first parent of a scored stage is what it starts from."""
    if lineage:
        names = [str(parent.get("stage")) for parent in lineage.get("parents") or []]
        # A policy that starts from the base itself has nothing but rewards and teachers among its parents.
        scored = kind is not None and (kind.needs_reward or kind.needs_teacher)
        first_is_start = not (scored and planned.get("from") == "base")
        if not names or not first_is_start:
            names = ["base", *names]
    else:
        given = planned.get("reward") or []
        rewards = [each.get("stage") for each in given if isinstance(each, Mapping)] if isinstance(given, list) else []
        teacher = planned.get("teacher")
        taught = [teacher.get("stage")] if isinstance(teacher, Mapping) else []
        names = [str(planned.get("from") or "base"), *(str(each) for each in (*rewards, *taught) if each)]
    return tuple((name, place > 0) for place, name in enumerate(names))


def _plan(text: str | None) -> Mapping[str, Any]:
    try:
        return _object(load_bounded(text)) if text else {}
    except yaml.YAMLError:
        return {}  # it is shown as text all the same


def _policy_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The rows that say whose they are."""
    return tuple(row for row in rows if isinstance(row.get("policy"), str))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rows(value: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(row for row in value if isinstance(row, dict)) if isinstance(value, list) else ()
