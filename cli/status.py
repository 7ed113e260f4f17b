"""`preftune status`: how far a run is, told from its files alone; takes no lock, writes nothing, imports no torch."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import EVALUATION, LOG, PROGRESS, RECIPE, RUN_STATE, json_objects, read_regular
from ..progress import duration
from ..values import is_finite
from .folder import Holder, RunFolder
from .output import Output

RUNNING, INTERRUPTED, TO_COME, DONE, FAILED = "running", "interrupted", "to come", "done", "failed"
AT_WORK, OVER = "at work", "nothing at work"
"""Of the run as a whole, besides `INTERRUPTED`."""

_METRICS = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "objective/scores": "score",
    "objective/kl": "kl",
    "rollout/length": "length",
}
"""What of log.jsonl is shown, under which name."""

_LOOK = 2.0
"""Seconds between two looks of --watch."""
_TAIL = 1 << 18
"""Bytes of a log that are read, from its end: hundreds of its lines."""


@dataclass(frozen=True)
class Step:
    """How far a stage, or the evaluation, is.

    Attributes:
        state: `done`, `running`, `failed`, `stopped`, `interrupted` or `to come`, of what the folder holds now.
        step, steps: done so far, and all; None where nothing says so.
        seconds: at work so far. left: what is left of its training at the speed so far, an estimate.
        metrics: the last of each that its log has.
        error: why it failed or was stopped.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    left: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def row(self) -> dict[str, object]:
        """For JSON: everything, what is not known as null."""
        numbers = {key: self.metrics.get(key) for key in _METRICS.values()}
        known = {"step": self.step, "steps": self.steps, "seconds": self.seconds, "left": self.left}
        return {"stage": self.name, "state": self.state, **known, **numbers, "error": self.error or None}

    def cells(self) -> dict[str, object]:
        """For the table."""
        times = {"time": self.seconds, "left": self.left}
        said = {key: None if value is None else duration(value) for key, value in times.items()}
        return {"stage": self.name, "state": self.state, "step": self._counted() or None, **said, **self.metrics}

    def line(self, *, timed: bool = True) -> str:
        """For a log: `sft: running, 12/75, loss 1.23, for 40.0 s, about 3 min 30 s left`."""
        said = [self.state, self._counted(), *(f"{key} {value:.4g}" for key, value in self.metrics.items())]
        if timed and self.seconds is not None:
            said.append(f"for {duration(self.seconds)}" if self.state == RUNNING else duration(self.seconds))
        if timed and self.left is not None:
            said.append(f"about {duration(self.left)} left")
        return f"{self.name}: {', '.join(filter(None, [*said, self.error]))}"

    def _counted(self) -> str:
        if self.step is None:
            return ""
        return str(self.step) if self.steps is None else f"{self.step}/{self.steps}"


@dataclass(frozen=True)
class Status:
    """A run: its state (`at work`, `interrupted`, `nothing at work`), who holds its folder, and its steps in order."""

    path: Path
    state: str
    holder: Holder | None
    steps: tuple[Step, ...]

    @property
    def failed(self) -> bool:
        """Whether somebody has to look after it."""
        return self.state == INTERRUPTED or (self.state == OVER and any(each.state == FAILED for each in self.steps))

    def row(self) -> dict[str, object]:
        """The run itself, for JSON."""
        holder = self.holder
        who = {"process": holder and holder.process, "host": (holder and holder.host) or None}
        return {"run": str(self.path), "state": self.state, **who}

    def line(self) -> str:
        """The run itself, in words."""
        said = self.state
        if self.state == INTERRUPTED:
            gone = "" if self.holder is None else f", its process {self.holder.process} is gone"
            said = f"interrupted{gone}; the command that began it continues it"
        elif self.holder is not None:
            where = "" if self.holder.is_here else f" on {self.holder.host}, which cannot be asked from here"
            said = f"at work (process {self.holder.process}{where})"
        return f"{self.path}: {said}"


def show_status(run: Path, watch: bool, output: Output) -> int:
    """Print how far the run is; with `watch` again every two seconds, until it is over.

    Returns:
        The exit code: 1 where the run is interrupted, or is over and a step of it failed.

    Raises:
        UserError: there is no run.
    """
    status = status_of(run)
    if watch and not output.json and _in_terminal():
        status = _redraw(status, output)
    elif watch:
        return _follow(status, output)
    _show(status, output)
    return int(status.failed)


def status_of(run: Path) -> Status:
    """How far a run is now.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    from .commands import run_folder

    folder = RunFolder(run_folder(run))
    holder = _read(folder)
    if holder is None and not (run / RUN_STATE).is_file():
        raise UserError(str(run), f"holds no {RUN_STATE}", "give the folder of a run (runs/NAME)")
    alive = None if holder is None or holder.is_gone else holder
    # the names of its steps come from its recipe, which a run writes once nothing is left that could refuse it
    names = dict.fromkeys([*_names(run), *folder.stages])
    steps = tuple(_step(folder, name, alive) for name in names)
    state = AT_WORK if alive is not None else OVER
    if alive is None and (holder is not None or any(each.state == INTERRUPTED for each in steps)):
        state = INTERRUPTED
    return Status(run, state, holder, steps)


def _read(folder: RunFolder) -> Holder | None:
    """Read run.json; who held the folder before and after that."""
    while True:
        holder = folder.holder()
        try:
            folder.read()
        except (OSError, ValueError, RecursionError) as error:
            place, remedy = str(folder.path / RUN_STATE), "the run's own command makes it again"
            raise UserError(place, f"cannot be read ({type(error).__name__})", remedy) from error
        # a run that began or ended in between would look like one that died
        if folder.holder() == holder:
            return holder


def _names(run: Path) -> Iterable[str]:
    """The stages of the run's recipe in order, and the evaluation; nothing where no recipe can be read."""
    from ..recipes.graph import order
    from ..recipes.load import load_recipe

    if not (run / RECIPE).is_file():
        return ()
    try:
        recipe = load_recipe(run / RECIPE)
    except UserError:
        return ()
    return [*order(recipe), *([EVALUATION] if recipe.eval is not None else [])]


def _step(folder: RunFolder, name: str, alive: Holder | None) -> Step:
    entry = folder.stages.get(name)
    if entry is None:
        return Step(name, TO_COME)
    state = str(entry.get("state"))
    # what says `running` and began before the run that is alive was cut off
    if state == RUNNING and (alive is None or str(entry.get("started")) < alive.started):
        state = INTERRUPTED
    place = folder.path / name if state == DONE else folder.partial(name)
    log, at = _tail(place / LOG), _progress(place)
    step = max((each["step"] for each in (*log, at) if is_finite(each.get("step"))), default=None)
    steps, seconds, left = at.get("steps"), entry.get("seconds"), None
    if state == RUNNING:
        seconds = _since(entry.get("started"))
        left = _left(at)
    elif state == INTERRUPTED:
        seconds = at.get("seconds")
    if state in (RUNNING, DONE) and any("train_runtime" in each for each in log[-2:]):
        steps = step
    elif state == RUNNING and not at:
        step = None  # it loads, and what the log may hold is of the interrupted one
    return Step(
        name,
        state,
        None if step is None else int(step),
        int(steps) if is_finite(steps) else None,
        round(float(seconds), 1) if is_finite(seconds) else None,
        left,
        _last(log),
        " ".join(str(entry.get("error") or "").split()),
    )


def _last(log: list[dict[str, Any]]) -> dict[str, float]:
    """The last of each; none where that was not finite, whatever stood before."""
    last = {name: next((row[key] for row in reversed(log) if key in row), None) for key, name in _METRICS.items()}
    return {name: float(value) for name, value in last.items() if is_finite(value)}


def _progress(folder: Path) -> dict[str, Any]:
    """What `callbacks.StepFile` wrote; empty where it did not."""
    try:
        found = json.loads(read_regular(folder / PROGRESS))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _left(at: Mapping[str, Any]) -> float | None:
    """Seconds until its last step, if each takes as long as those since it began or went on."""
    numbers = [float(at[key]) for key in ("step", "steps", "began", "seconds") if is_finite(at.get(key))]
    if len(numbers) != 4:
        return None
    step, steps, began, seconds = numbers
    return round((steps - step) * seconds / (step - began), 1) if step > began else None


def _since(started: object) -> float | None:
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(str(started))).total_seconds())
    except (ValueError, TypeError):
        return None


def _tail(file: Path) -> list[dict[str, Any]]:
    """The last rows of a log; a row that is being written now is left out."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - _TAIL))
            return json_objects(opened.read().decode("utf-8", errors="replace"))
    except OSError:
        return []


def _show(status: Status, output: Output) -> None:
    if output.json:
        output.rows([status.row(), *(each.row() for each in status.steps)])
        return
    output.say(status.line())
    output.rows(each.cells() for each in status.steps)
    for each in status.steps:
        if each.error:
            output.say(f"{each.name}: {each.error}")


def _in_terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _redraw(status: Status, output: Output) -> Status:
    """Draw it anew on a screen of its own until the run is over; the last state."""
    from rich.console import Console

    console = Console()
    with console.screen(hide_cursor=True):
        while status.state == AT_WORK:
            console.clear()
            _show(status, output)
            time.sleep(_LOOK)
            status = status_of(status.path)
    return status


def _follow(status: Status, output: Output) -> int:
    """Print what changed, a line each, until the run is over: more seconds alone are no change."""
    said: dict[str, object] = {}
    while True:
        for name, line, row in _lines(status):
            if said.get(name) != line[0]:
                said[name] = line[0]
                if output.json:
                    output.rows([row])
                else:
                    output.say(line[1])
        if status.state != AT_WORK:
            return int(status.failed)
        time.sleep(_LOOK)
        status = status_of(status.path)


def _lines(status: Status) -> Iterable[tuple[str, tuple[str, str], Mapping[str, object]]]:
    """(of which step, its line without and with times, its row); first of the run itself."""
    yield "", (status.line(), status.line()), status.row()
    for each in status.steps:
        yield each.name, (each.line(timed=False), each.line()), each.row()
