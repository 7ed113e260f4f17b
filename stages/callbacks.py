"""What every trainer of ours calls back to: log.jsonl, progress, the clock."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from .. import stopping
from ..files import write_whole
from ..models.memory import Holes, reset_peak_memory
from ..progress import Meter
from ..values import plain

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_WRITINGS = 2.0


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the rows that `keep` wants in a file of JSON lines (made if it is not there).

    A row that a kill cut off goes too. Not `splitlines`: a text may hold other line ends, which JSON does not escape.
    """
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if keep(row):
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


def keep_event_files(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard's event files written there, not among the checkpoints; unless the environment says where."""
    for each in trainer.callback_handler.callbacks:
        if type(each).__name__ == "TensorBoardCallback" and getattr(each, "logging_dir", "") is None:
            each.logging_dir = str(folder)  # pyright: ignore[reportAttributeAccessIssue]: what that callback reads


class LogFile(TrainerCallback):
    """Every log of the trainer as one JSON object a line, with its step. What is not finite is written as null.

    The last step is logged too, though `logging_steps` may pass it by: it says how the run ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a resumed run replays the steps after its checkpoint: their old lines go
        keep_rows(self.path, lambda row: state.global_step > 0 and row["step"] <= state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain({"step": state.global_step, **logs}), ensure_ascii=False) + "\n")


_SHOWN = {
    "eval_loss": "eval_loss",
    "loss": "loss",
    "objective/scores": "score",
    "objective/kl": "KL",
    "rollout/length": "length",
    "eval_objective/scores": "held-out score",
    "eval_objective/kl": "held-out KL",
}
"""What of a log the progress shows, under which name; of the two losses the later one."""
_DRAWN = ("loss", "objective/scores")
"""Of which a bar draws the curve: a method logs one of them."""


class ProgressBar(TrainerCallback):
    """A bar on a terminal; elsewhere a plain line now and then: `sft: 12/75 loss 1.23`, `ppo: 8/64 score 0.5 ...`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown: dict[str, str] = {}
        self.curve: list[float] = []
        self.meter: Meter | None = None

    @property
    def note(self) -> str:
        """What was last measured."""
        return " ".join(self.shown[key] for key in _SHOWN if key in self.shown)

    def drawing(self, step: int, done: int, total: int) -> None:
        """So many responses of a rollout are drawn, after that step: a bar says so, lines leave it out."""
        if self.meter is not None and done < total:
            self.meter(step, f"{self.note} (draws {done}/{total})".lstrip(), self.curve)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.is_world_process_zero:
            self.meter = Meter(
                self.name,
                state.max_steps,
                quiet=0,
                lines=_SECONDS_BETWEEN_LINES,
                bars=not args.disable_tqdm,
                stoppable=False,
                begun=state.global_step,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        for key, name in _SHOWN.items():
            if logs and isinstance(logs.get(key), float):
                if key.endswith("loss"):
                    self.shown.pop("eval_loss", None)
                    self.shown.pop("loss", None)
                self.shown[key] = f"{name} {logs[key]:.4g}"
                if key in _DRAWN:
                    self.curve.append(logs[key])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # the last step is said at the end, when its loss is known
        if self.meter is not None and state.global_step < state.max_steps:
            self.meter(state.global_step, self.note, self.curve)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.meter is not None:
            self.meter.say(state.global_step, self.note)
            self.meter.close()
            self.meter = None


class StepFile(TrainerCallback):
    """How far the training is, for whoever looks on from another process: written every two seconds, gone at its end.

    {"step": done so far, "steps": all, "began": the step that this process went on from, "seconds": since then}. One
    that was stopped, or died, leaves it behind.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._began = path, 0
        self._since = self._written = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._began, self._since = state.global_step, time.monotonic()
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.is_world_process_zero and time.monotonic() - self._written > _SECONDS_BETWEEN_WRITINGS:
            self._write(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not state.is_world_process_zero:
            return
        if stopping.requested() is None:
            self.path.unlink(missing_ok=True)
        else:
            self._write(state)

    def _write(self, state: TrainerState) -> None:
        self._written = time.monotonic()
        write_step(self.path, state.global_step, state.max_steps, self._began, self._written - self._since)


def write_step(path: Path, step: int, steps: int, began: int, seconds: float) -> None:
    """Write how far a stage is, as `StepFile` says."""
    row = {"step": step, "steps": steps, "began": began, "seconds": round(seconds, 3)}
    with suppress(OSError):  # no reason to end it
        write_whole(path, json.dumps(row) + "\n")


class Clock(TrainerCallback):
    """Seconds of the training loop, those before a checkpoint that the run continues from included."""

    seconds: float = 0.0
    _began: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        reset_peak_memory()
        self._began = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.seconds, self._began = self.spent(), None

    def spent(self) -> float:
        """Seconds so far."""
        return self.seconds + (0.0 if self._began is None else time.perf_counter() - self._began)


class HandingBack(TrainerCallback):
    """Hands back what a CPU's allocator holds for nothing, now and then (`memory.Holes`)."""

    def __init__(self) -> None:
        self._holes = Holes()

    def on_substep_end(self, args: TrainingArguments, *_: object, **__: object) -> None:
        if args.device.type == "cpu":
            self._holes.look()

    on_step_end = on_substep_end


def clock_of(trainer: Trainer) -> Clock:
    """The clock among the trainer's callbacks."""
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Clock))
