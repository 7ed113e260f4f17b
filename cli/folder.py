"""A run's folder: run.json, the lock, and stage folders that appear complete or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ADAPTER_CONFIG, RUN_STATE, finish_replacing, replace_folder, write_whole

STAMP = ".key.json"
"""In a stage's folder: the key that it was made for."""


@dataclass(frozen=True)
class Stamp:
    """What a finished step was made for.

    Attributes:
        key: sha256 of `parts`.
        parts: what the key is made of, by name.
        started: UTC, ISO 8601.
        seconds: how long it took.
    """

    key: str
    parts: dict[str, Any]
    started: str
    seconds: float = 0.0


@dataclass
class RunFolder:
    """The folder of one run. `stages` is the content of run.json: one entry per step, in the order they ran in."""

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self) -> None:
        """Read run.json, and repair what a crash left half done. Only under the lock.

        Raises:
            UserError: run.json cannot be read.
        """
        file = self.path / RUN_STATE
        if file.is_file():
            try:
                self.stages = dict(json.loads(file.read_text(encoding="utf-8"))["stages"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(str(file), f"unreadable ({error})", "delete it; finished stages are kept") from error
        finish_replacing(self.path)

    def partial(self, name: str) -> Path:
        """The folder that a stage is written to until it is complete."""
        return self.path / f".{name}.partial"

    def stamp(self, name: str) -> Stamp | None:
        """What the stage's folder was made for; None if there is no complete one."""
        return _read_stamp(self.path / name)

    def record(self, name: str, **values: Any) -> None:
        """Set a step's entry in run.json."""
        self.stages[name] = values
        write_whole(self.path / RUN_STATE, json.dumps({"stages": self.stages}, indent=2) + "\n")

    def begin(self, name: str, stamp: Stamp, *, fresh: bool = False) -> Path:
        """An output folder for the stage: what an interrupted run left for the same key, or else an empty one.

        Args:
            fresh: return an empty one in any case.
        """
        partial = self.partial(name)
        left = _read_stamp(partial)
        if fresh or left is None or left.key != stamp.key:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_stamp(partial, stamp)
        return partial

    def promote(self, name: str, stamp: Stamp) -> None:
        """Move a completed stage's folder to its final place; only then is an older one removed."""
        partial = self.partial(name)
        write_stamp(partial, stamp)
        replace_folder(partial, self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run at a time. A process that dies releases it.

        Raises:
            UserError: another process holds it.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / ".lock.pid"
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            pid = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "?"
            said = f"another run (process {pid}) is at work in it"
            raise UserError(str(self.path), said, "wait for it, or use another --output-dir") from None
        try:
            holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def holds_adapter(folder: Path) -> bool:
    """Whether a PEFT adapter lies in the folder, as in that of every finished stage."""
    return (folder / ADAPTER_CONFIG).is_file()


def write_stamp(folder: Path, stamp: Stamp) -> None:
    """Write into a folder what it was made for."""
    write_whole(folder / STAMP, json.dumps(asdict(stamp), indent=1) + "\n")


def _read_stamp(folder: Path) -> Stamp | None:
    try:
        return Stamp(**json.loads((folder / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
