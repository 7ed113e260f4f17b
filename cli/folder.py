"""A run's folder: run.json, the lock, and stage folders that appear complete or not at all.

Everything in it that we did not write is somebody's, and stays: a folder that is no run's is refused, and only what
carries our stamp is ever replaced.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import (
    ADAPTER_CONFIG,
    CHECKPOINTS,
    DOCTOR,
    EVAL_CACHE,
    EVALUATION,
    LINEAGE,
    LOG,
    MANIFEST,
    MODEL_CONFIG,
    PROGRESS,
    RECIPE,
    REPORT,
    RUN_STATE,
    STAMP,
    finish_replacing,
    is_ours,
    is_running,
    partial_folder,
    read_regular,
    replace_folder,
    strangers,
    sweep,
    to_disk,
    write_whole,
)
from ..intact import contents, damage
from .keys import counted, key_of

_LOCK, _HOLDER = ".lock", ".lock.pid"
_REMEDY = "give another --output-dir"


@dataclass(frozen=True)
class Stamp:
    """What a finished step was made for.

    Attributes:
        key: sha256 of `parts`.
        parts: what the key is made of, by name.
        started: UTC, ISO 8601.
        seconds: how long it took.
        files: size and hash of every file that counts (`intact.contents`); holds: what was written directly into the
            folder. Both empty while the step is under way, and in folders of earlier versions.
        idle: settings that are no part of the key, as they change no result.
    """

    key: str
    parts: dict[str, Any]
    started: str
    seconds: float = 0.0
    files: dict[str, list[int | str]] = field(default_factory=dict)
    holds: list[str] = field(default_factory=list)
    idle: dict[str, Any] = field(default_factory=dict)

    def made_for(self, key: str) -> bool:
        """Whether the key is the step's; earlier versions counted settings into theirs that change no result."""
        return key_of(counted(self.parts)) == key

    def idle_settings(self) -> dict[str, Any]:
        """The settings that it was made with and that change no result."""
        kept = counted(self.parts)
        return {**{name: value for name, value in self.parts.items() if name not in kept}, **self.idle}


@dataclass(frozen=True)
class Holder:
    """Who holds a run's folder, as it wrote itself: its process, on which machine, since when (UTC, ISO 8601).

    `host` and `started` are empty where an earlier version wrote it.
    """

    process: int
    host: str = ""
    started: str = ""

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, which can be looked for."""
        return self.host in ("", socket.gethostname())

    @property
    def is_gone(self) -> bool:
        """Whether it died without a word; of another machine's process nobody here can say so."""
        return self.is_here and not is_running(self.process)


@dataclass
class RunFolder:
    """The folder of one run. `stages` is the content of run.json: one entry per step, in the order they ran in."""

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self) -> str:
        """Read run.json, and repair what a crash left half done. Only under the lock.

        Returns:
            What was wrong with run.json, in words; empty where nothing was. It is then made again from the stages.
        """
        finish_replacing(self.path)
        sweep(self.path, (RUN_STATE, RECIPE, REPORT, DOCTOR, EVALUATION))
        for file in (self.path / EVAL_CACHE).glob(".*.json.*"):
            sweep(file.parent, (file.name[1:].rpartition(".")[0],))
        file, said = self.path / RUN_STATE, ""
        try:
            self.stages = _read_state(file) if file.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            self.stages = self._finished_steps()
            self._write_state()
            found = f"the {len(self.stages)} finished steps that lie there" if self.stages else "nothing finished"
            said = f"{file} cannot be read ({_first_words(error)}): made again from {found}"
        return said

    def partial(self, name: str) -> Path:
        """The folder that a stage is written to until it is complete."""
        return partial_folder(self.path, name)

    def stamp(self, name: str) -> Stamp | None:
        """What the stage's folder was made for; None if there is no complete one, or its stamp cannot be read."""
        return _read_stamp(self.path / name)

    def begun(self, name: str) -> Stamp | None:
        """The same of the folder that a stage under way is written to."""
        return _read_stamp(self.partial(name))

    def damage(self, name: str) -> str | None:
        """What of a finished step's folder is not as it was written, in words."""
        return damage(self.path / name)

    def checkpoint_step(self, name: str) -> int | None:
        """The optimiser step of the newest whole checkpoint that a stage under way has; None where it has none."""
        names = [each.parent.name for each in (self.partial(name) / CHECKPOINTS).glob(f"checkpoint-*/{MANIFEST}")]
        steps = [int(each.rpartition("-")[2]) for each in names if each.rpartition("-")[2].isdecimal()]
        return max(steps, default=None)

    def prompts_done(self, name: str) -> int | None:
        """How many prompts a sampling stage under way is done with; None where it is not one, or has drawn nothing."""
        places = [each.stem for each in (self.partial(name) / CHECKPOINTS).glob("replies-*-*.json")]
        ends = [int(each.rpartition("-")[2]) for each in places if each.rpartition("-")[2].isdecimal()]
        return max(ends, default=None)

    def record(self, name: str, **values: Any) -> None:
        """Set a step's entry in run.json."""
        self.stages[name] = values
        self._write_state()

    def check_places(self, names: Collection[str]) -> None:
        """Nobody else's folder or file stands where one of these steps is written, before anything is.

        Raises:
            UserError: one does.
        """
        for name in names:
            for place in (self.path / name, self.path / f".{name}.old"):
                if (place.is_symlink() or place.exists()) and not is_ours(place):
                    said = f"is no finished step of a run ({_shown(place)}), and {name} is written there"
                    raise UserError(str(place), said, f"move it away, or {_REMEDY}")
            partial = self.partial(name)
            if (partial.is_symlink() or partial.exists()) and not _is_partial(partial):
                said = f"is no interrupted step of a run ({_shown(partial)}), and {name} is written there"
                raise UserError(str(partial), said, f"move it away, or {_REMEDY}")

    def begin(self, name: str, stamp: Stamp, *, fresh: bool = False) -> Path:
        """An output folder for the stage: what an interrupted run left for the same key, or else an empty one.

        Args:
            fresh: return an empty one in any case.
        """
        partial = self.partial(name)
        left = _read_stamp(partial)
        if fresh or left is None or not left.made_for(stamp.key):
            self.check_places([name])
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_stamp(partial, stamp)
        (partial / PROGRESS).unlink(missing_ok=True)  # that of the interrupted one
        return partial

    def promote(self, name: str, stamp: Stamp) -> str:
        """Move a completed stage's folder to its final place; only then is an older one removed.

        Returns:
            What somebody else had put into the older one, and where it lies now, in words; empty where nothing.
        """
        partial, final = self.partial(name), self.path / name
        (partial / PROGRESS).unlink(missing_ok=True)
        for each in partial.iterdir():
            if re.fullmatch(r"\..+\.\d+", each.name) and each.is_file():
                each.unlink()  # a file that was being written when an earlier process was killed
        seal(partial, stamp)
        foreign = strangers(final) if final.is_dir() else []
        replace_folder(partial, final)
        to_disk(self.path)
        return f"{', '.join(foreign)}, not written by it, now in {final}.before" if foreign else ""

    def forget_partials(self, known: Collection[str]) -> list[str]:
        """Remove what interrupted runs left of stages that are not among the known ones; returns their names."""
        gone = []
        for partial in sorted(self.path.glob(".*.partial")):
            name = partial.name[1 : -len(".partial")]
            if name not in known and not partial.is_symlink() and _is_partial(partial) and (partial / STAMP).is_file():
                shutil.rmtree(partial, ignore_errors=True)
                gone.append(name)
        return gone

    @contextmanager
    def lock(self, *, existing: bool = False) -> Iterator[None]:
        """Hold the folder for one run at a time. A process that dies releases it.

        Args:
            existing: it is a run's, the caller has seen to it.

        Raises:
            UserError: another process holds it, it cannot be written to, or what lies in it is no run's.
        """
        from filelock import FileLock, Timeout

        holder = self.path / _HOLDER
        try:
            if self.path.is_file():
                raise UserError(str(self.path), "is a file, and no folder", _REMEDY)
            self.path.mkdir(parents=True, exist_ok=True)
            if not existing:
                self._check_ours()
            lock = FileLock(self.path / _LOCK)
            lock.acquire(timeout=0)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_whole(holder, f"{os.getpid()}\n{socket.gethostname()}\n{now}\n")
        except Timeout:
            found = self.holder()
            said = f"another run (process {found.process if found else '?'}) is at work in it"
            raise UserError(str(self.path), said, f"wait for it, or {_REMEDY}") from None
        except (OSError, ValueError, NotImplementedError) as error:
            said = f"cannot be a run's folder ({_first_words(error)})"
            raise UserError(str(self.path), said, _REMEDY) from error
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def holder(self) -> Holder | None:
        """Who holds the folder now, or died while it did; None where it is free. Takes no lock."""
        try:
            process, host, started, *_ = [*read_regular(self.path / _HOLDER).splitlines(), "", "", ""]
            return Holder(int(process), host, started)
        except (OSError, ValueError):
            return None

    def read(self) -> None:
        """Read run.json as it is, and change nothing: for whoever looks on while the run goes on.

        Raises:
            OSError, ValueError, RecursionError: it cannot be read.
        """
        file = self.path / RUN_STATE
        self.stages = _read_state(file) if file.is_file() else {}

    def _write_state(self) -> None:
        write_whole(self.path / RUN_STATE, json.dumps({"stages": self.stages}, indent=2) + "\n")

    def _check_ours(self) -> None:
        """Raises UserError where the folder holds something and no run did it: one has run.json, a lock or a stage."""
        held = sorted(each.name for each in self.path.iterdir() if each.name not in (".DS_Store", "lost+found"))
        lock = self.path / _LOCK
        if not held or (lock.is_file() and not lock.is_symlink() and not lock.stat().st_size):
            return
        try:
            _read_state(self.path / RUN_STATE)
            return
        except (OSError, ValueError, RecursionError):
            pass
        if RUN_STATE in held and any((self.path / name / STAMP).is_file() for name in held):
            return
        said = f"holds {_listed(held)}, and is no run's folder"
        raise UserError(str(self.path), said, "give a new or empty folder as --output-dir: nothing in it was touched")

    def _finished_steps(self) -> dict[str, dict[str, Any]]:
        """The entries of run.json as far as the finished folders tell them, in the order they ran in."""
        found = {each.name: self.stamp(each.name) for each in self.path.iterdir() if not each.name.startswith(".")}
        sound = {name: stamp for name, stamp in found.items() if stamp is not None}
        return {name: finished_entry(stamp) for name, stamp in sorted(sound.items(), key=lambda each: each[1].started)}


def finished_entry(stamp: Stamp) -> dict[str, Any]:
    """What run.json says of a step that is done."""
    return {"state": "done", "key": stamp.key, "seconds": round(stamp.seconds, 3), "started": stamp.started}


def holds_adapter(folder: Path) -> bool:
    """Whether a PEFT adapter lies in the folder, as in that of every finished stage."""
    return (folder / ADAPTER_CONFIG).is_file()


def no_adapter(folder: Path, remedy: str, where: str = "") -> UserError:
    """What to say of a folder that holds none; a stage with `full: true` has left a whole model there.

    Args:
        remedy: of a folder with neither.
        where: what named the folder; default: the folder.
    """
    if (folder / LINEAGE).is_file() and (folder / MODEL_CONFIG).is_file():
        said = "holds a whole model (full: true), which needs no base"
        remedy = f"use it as it lies: model.base: {folder} in a recipe, from_pretrained elsewhere"
    else:
        said = "holds no adapter"
    return UserError(where or str(folder), f"{str(folder)!r} {said}" if where else said, remedy)


def write_stamp(folder: Path, stamp: Stamp) -> None:
    """Write into a folder what it is made for."""
    write_whole(folder / STAMP, json.dumps(asdict(stamp), indent=1) + "\n")


def seal(folder: Path, stamp: Stamp) -> None:
    """Write into a complete folder what it was made for, and what it holds."""
    held = sorted({each.name for each in folder.iterdir()} - {STAMP})
    files = contents(folder)
    for name in files:
        to_disk(folder / name)
    write_stamp(folder, replace(stamp, files=files, holds=held))
    to_disk(folder / STAMP)
    to_disk(folder)


def _read_stamp(folder: Path) -> Stamp | None:
    try:
        raw = json.loads(read_regular(folder / STAMP))
        known = {each.name for each in fields(Stamp)}
        stamp = Stamp(**{name: value for name, value in raw.items() if name in known})
        sound = isinstance(stamp.parts, dict) and isinstance(stamp.started, str) and stamp.seconds >= 0
        return stamp if sound and key_of(stamp.parts) == stamp.key else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _read_state(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of run.json. Raises OSError or ValueError where it holds anything else."""
    raw = json.loads(read_regular(file))
    stages = raw.get("stages") if isinstance(raw, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(each, dict) for each in stages.values()):
        raise ValueError("not what a run writes")
    return dict(stages)


def _is_partial(folder: Path) -> bool:
    """Whether a folder is what a step of ours left under way: our stamp lies in it, or what we write first."""
    if not folder.is_dir():
        return False
    held = {each.name for each in folder.iterdir() if not each.name.startswith(f".{STAMP}.")}
    return is_ours(folder) or not held or bool(held & {STAMP, CHECKPOINTS, LOG})


def _shown(path: Path) -> str:
    return f"it holds {_listed(sorted(each.name for each in path.iterdir()))}" if path.is_dir() else "a file"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _first_words(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:120] or type(error).__name__
