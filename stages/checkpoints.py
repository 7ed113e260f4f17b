"""Checkpoints that appear whole or not at all, and that a run continues from exactly.

    checkpoint-N/               of optimiser step N: transformers' own files (adapter, optimizer, scheduler, RNG, ...)
        progress_R.json         what the trainer of process R keeps in memory alone (`Progress`)
        manifest.json           size and sha256 of every other file

One is written beside its place, in `.saving`, and moved there when it is complete and on the disk. What does not fit
its manifest is damaged, and passed over in words.
"""

import json
import re
import shutil
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from .. import stopping
from ..errors import UserError
from ..faults import refusal
from ..files import LOG, MANIFEST, sha256_of, to_disk, write_whole
from ..models import seams
from ..models.sharded import most_of_all
from ..progress import say
from .job import CheckpointPlan

SAVING = ".saving"
_STATE = "trainer_state.json"
_SHARED = 60.0
"""Seconds after which every machine must see what one wrote to a disk that they share."""


@dataclass
class Progress:
    """What a trainer counts from the run's first step on, and its checkpoint's transformers' part lacks.

    Attributes:
        loss: the sum of the losses since the last log, before it is divided; logged_step: the step of that log.
        total_loss: the same up to that log.
        metrics: TRL's since the last log. tokens: trained on.
        seconds: of the training loop; evaluate_seconds: of them, in evaluation.
        log_bytes: length of log.jsonl: what stands behind it is written again.
        epoch_ends: what follows an epoch's last step (evaluation above all) was still to come.
        skipped: steps left out because a number was not finite.
        more: of the kind of trainer.
    """

    loss: float = 0.0
    logged_step: int = 0
    total_loss: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    tokens: float = 0.0
    seconds: float = 0.0
    evaluate_seconds: float = 0.0
    log_bytes: int = 0
    epoch_ends: bool = False
    skipped: int = 0
    more: dict[str, float] = field(default_factory=dict)


def progress_file(checkpoint: Path, process: int) -> Path:
    """Where a checkpoint holds the `Progress` of one process."""
    return checkpoint / f"progress_{process}.json"


def read_progress(checkpoint: Path, process: int, processes: int) -> Progress:
    """Of a complete checkpoint. Where another number of processes wrote it, the first one's, which counts for all, with
    the mean of their sums of losses: what is logged is a mean over processes.

    Args:
        processes: how many there are now.
    """
    files = sorted(checkpoint.glob("progress_*.json"))
    if len(files) == processes:
        return Progress(**json.loads(progress_file(checkpoint, process).read_text(encoding="utf-8")))
    all_of_them = [Progress(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    first = Progress(**json.loads(progress_file(checkpoint, 0).read_text(encoding="utf-8")))
    first.loss = sum(each.loss for each in all_of_them) / len(files)
    first.total_loss = sum(each.total_loss for each in all_of_them) / len(files)
    return first


def accumulation(folder: Path, steps: int, processes: int) -> int:
    """In how many micro-batches each process takes an optimiser step, so that it has the rows that it had in the run
    which the newest checkpoint is of; as the config says where there is none, or where none would do.

    Args:
        steps: what the config says. processes: how many there are now.
    """
    for _, checkpoint in reversed(checkpoints(folder)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            whole, rest = divmod(_micro_batches(_read_manifest(checkpoint), steps), processes)
            return steps if rest else whole
    return steps


def _micro_batches(manifest: dict[str, Any], steps: int) -> int:
    """Of an optimiser step, in all processes; earlier versions did not write in how many each took it."""
    return int(manifest["processes"]) * int(manifest.get("accumulation", steps))


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of all that lie in the folder, the oldest first."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return sorted(found)


def newest(folder: Path, name: str, world_size: int | None, accumulation: int = 1) -> Path | None:
    """The newest checkpoint that is whole; the others are passed over in words.

    Args:
        name: of the stage, for the words.
        world_size: how many processes there are; None: it does not matter how many wrote it.
        accumulation: in how many micro-batches each takes an optimiser step.

    Raises:
        UserError: in the run that wrote it a step had other rows.
    """
    for _, checkpoint in reversed(checkpoints(folder)):
        why = _unusable(checkpoint)
        if why is None:
            manifest = _read_manifest(checkpoint)
            if world_size is not None and _micro_batches(manifest, accumulation) != world_size * accumulation:
                wrote = manifest["processes"]
                problem = f"its {checkpoint.name} is of {wrote} processes and this run has {world_size}"
                remedy = f"launch {wrote}, or start the stage anew: --force"
                raise UserError(f"stages.{name}", problem, remedy)
            return checkpoint
        if why:
            say(f"{name}: {checkpoint.name} is passed over, {why}")
    return None


def newest_for_all(folder: Path, name: str, args: TrainingArguments, *, of_any_number: bool) -> Path | None:
    """`newest`, once every process finds the same one: a disk that machines share may show one late what another wrote.

    Raises:
        UserError: they still do not after a minute.
    """
    began = time.monotonic()
    while True:
        processes = None if of_any_number else args.world_size
        found = newest(folder, name, processes, args.gradient_accumulation_steps)
        step = int(found.name.rpartition("-")[2]) if found is not None else 0
        highest, lowest, late = agreed(args, step, -step, int(time.monotonic() - began > _SHARED))
        if highest == -lowest:
            return found
        if late:
            said = f"one process finds step {highest} as the newest, another {-lowest}"
            raise UserError(str(folder), said, "give all machines the same folder")
        time.sleep(1)


def _unusable(checkpoint: Path) -> str | None:
    """Why it cannot be continued from, in words; empty for one that was never meant to; None if it can be."""
    if not (checkpoint / MANIFEST).is_file():
        return "" if (checkpoint / _STATE).is_file() else "it was not written to its end"
    try:
        manifest = _read_manifest(checkpoint)
        files, _ = manifest["files"], int(manifest["processes"])
        for name, (size, digest) in files.items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != size or sha256_of(file) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def is_asked(checkpoint: Path) -> bool:
    """Whether the recipe asks for this checkpoint, which then stays; the others are there to continue from."""
    try:
        return bool(_read_manifest(checkpoint).get("asked", True))
    except FileNotFoundError:
        return True  # of the model alone (`save_only_model`), which only a recipe asks for
    except (OSError, ValueError):
        return False


def seal(checkpoint: Path, *, processes: int, asked: bool, accumulation: int = 1) -> None:
    """Write the manifest of a checkpoint whose other files are all there, and see that everything is on the disk."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != MANIFEST]
    entries = {file.relative_to(checkpoint).as_posix(): [file.stat().st_size, sha256_of(file)] for file in files}
    said = {"asked": asked, "processes": processes, "accumulation": accumulation, "files": entries}
    write_whole(checkpoint / MANIFEST, json.dumps(said, indent=1) + "\n")
    for file in (*files, checkpoint / MANIFEST, checkpoint):
        to_disk(file)


def settle(checkpoint: Path, final: Path) -> None:
    """Move a sealed checkpoint to its place, where an older one of the same step makes room.

    Cut off in between, `salvage` finds the new one.
    """
    if final.exists():
        final.rename(checkpoint.with_name("old"))
    checkpoint.rename(final)
    to_disk(final.parent)


def salvage(folder: Path) -> None:
    """Put a checkpoint in its place that was sealed and not yet moved; what else was being written goes."""
    for _, sealed in checkpoints(folder / SAVING):
        if (sealed / MANIFEST).is_file() and not (folder / sealed.name).exists():
            sealed.rename(folder / sealed.name)
    shutil.rmtree(folder / SAVING, ignore_errors=True)


def remove_older(newest: Path, limit: int | None, keep: Iterable[str] = ()) -> None:
    """Remove what the newest checkpoint makes superfluous: those nobody asked for, and of the others all but `limit`.

    Args:
        limit: `save_total_limit`; None or 0: all that were asked for stay.
        keep: names of checkpoints that stay in any case (the best one).
    """
    # by step: a clock may be set back
    others = [path for _, path in reversed(checkpoints(newest.parent)) if path != newest and path.name not in keep]
    asked = [path for path in others if is_asked(path)]
    room = len(asked) if not limit else max(limit - 1, 0)
    for path in {*others} - {*asked[:room]}:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _in_words(folder: Path, last: int | None) -> Generator[None]:
    """A checkpoint that cannot be written ends the stage in one line: what it cannot save, it should not train."""
    try:
        yield
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        problem, remedy = refused
        goes_on = "the stage's start" if last is None else f"step {last}"
        said = f"{remedy}; the same command continues from {goes_on}"
        raise UserError(str(folder), f"a checkpoint cannot be written: {problem}", said) from error


class Continuing(TrainerCallback):
    """Asks for the checkpoints of a `CheckpointPlan`, and for one where a signal asks the run to stop.

    Args:
        plan: None: none are written, and a signal stops without one.
    """

    def __init__(self, name: str, plan: CheckpointPlan | None) -> None:
        self.name, self.plan = name, plan
        self.own, self.step_ended = False, False
        self.stop: int | None = None
        self._saved = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._saved = time.monotonic()
        # a checkpoint brings the steps between two logs of the run that wrote it; they may be others now
        state.compute_steps(args, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.step_ended = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.step_ended, self.own = True, False
        minutes = self.plan.minutes if self.plan is not None else None
        late = minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        late, stop = agreed(args, int(late), stopping.requested() or 0)
        self.stop = stop or None
        if self.plan is None:
            if self.stop:
                raise self.stopped(state, "without a checkpoint: it starts anew")
            return
        if (late or self.stop or self._share_done(state)) and not control.should_save:
            self.own = control.should_save = True

    def _share_done(self, state: TrainerState) -> bool:
        share = self.plan.share if self.plan is not None else None
        if share is None or state.global_step >= state.max_steps:
            return False  # the adapter itself is about to be written
        return state.global_step % max(1, round(share * state.max_steps)) == 0

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.step_ended = self.own = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._saved = time.monotonic()
        if self.stop:
            raise self.stopped(state, "with a checkpoint")

    def stopped(self, state: TrainerState, how: str) -> stopping.Stopped:
        """What ends the training where a signal asked for it."""
        assert self.stop is not None
        place = f"at step {state.global_step} of {state.max_steps}, {how}"
        return stopping.Stopped(self.stop, f"{self.name}: {stopping.Stopped(self.stop)} {place}")


def agreed(args: TrainingArguments, *values: int) -> tuple[int, ...]:
    """The largest of each value over all processes: what one of them is told, all must do at the same step."""
    return values if args.world_size == 1 else most_of_all(args.device, *values)


class Resumable(Trainer):
    """Mixed in before a trainer: its checkpoints are whole, and hold its `Progress`.

    Attributes:
        continued: the checkpoint that this run continues from.
        resumed: what it said, until the loop has begun.
        of_any_number: whether a checkpoint of another number of processes is continued from.
    """

    of_any_number = False

    continued: str | None = None
    resumed: Progress | None = None
    _beside: str | None = None

    def progress(self) -> Progress:
        """Where this process stands. Overridden by trainers that count more."""
        raise NotImplementedError

    def save_more(self, checkpoint: Path) -> None:
        """Write what this kind of trainer adds to a checkpoint; every process is asked."""

    def _get_output_dir(self, trial: Any) -> str:
        return self._beside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args = self.args
        if args.save_only_model:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(super()._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        beside = folder / SAVING / final.name
        before = [step for step, _ in checkpoints(folder)]
        with _in_words(folder, max(before, default=None)):
            try:
                self._write(model, trial, beside)
                if args.should_save:
                    own = continuing(self)
                    asked = not (own is not None and own.own) or (final.is_dir() and is_asked(final))
                    self._write_state(beside, folder)
                    split = args.gradient_accumulation_steps
                    seal(beside, processes=args.world_size, asked=asked, accumulation=split)
                    settle(beside, final)
                    best = Path(self.state.best_model_checkpoint or "").name
                    remove_older(final, args.save_total_limit, [best])
            finally:
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    shutil.rmtree(folder / SAVING, ignore_errors=True)

    def _write(self, model: Any, trial: Any, beside: Path) -> None:
        """Everything but the manifest, by all processes."""
        args = self.args
        if args.should_save:
            shutil.rmtree(beside.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        beside.mkdir(parents=True, exist_ok=True)
        # the older ones go when this one is complete, not before
        limit, args.save_total_limit, self._beside = args.save_total_limit, None, str(beside.parent)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, self._beside = limit, None
        self.save_more(beside)
        file = progress_file(beside, args.process_index)
        file.write_text(json.dumps(asdict(self.progress())), encoding="utf-8")
        self.accelerator.wait_for_everyone()

    def _write_state(self, beside: Path, folder: Path) -> None:
        """The trainer's state again, with the best checkpoint where it will lie."""
        best = self.state.best_global_step
        here = folder / f"checkpoint-{best}" if best else None
        if here is not None and (here.is_dir() or here.name == beside.name):
            self.state.best_model_checkpoint = str(here)
        self.state.save_to_json(str(beside / _STATE))


def continuing(trainer: Trainer) -> Continuing | None:
    """The callback among the trainer's own."""
    return next((each for each in trainer.callback_handler.callbacks if isinstance(each, Continuing)), None)


def log_bytes(output_dir: Path) -> int:
    """Length of a stage's log.jsonl, once what stands in it is on the disk."""
    file = output_dir / LOG
    if not file.is_file():
        return 0
    to_disk(file)
    return file.stat().st_size


def restore_stopping(trainer: Trainer, checkpoint: Path) -> bool:
    """Give early stopping its patience back, and the best checkpoint its place if the run folder was moved.

    Returns:
        Whether the training had been told to stop, by early stopping or at its last step.
    """
    seams.require(seams.CALLBACK_STATE)
    state = trainer.state
    kept: Any = state.stateful_callbacks  # declared as a list, and a mapping by name
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback) and isinstance(said := kept.get(type(callback).__name__), dict):
            for name, value in said["attributes"].items():
                setattr(callback, name, value)
    if state.best_global_step:
        best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None
    control = kept.get("TrainerControl")
    return isinstance(control, dict) and bool(control["args"]["should_training_stop"])
