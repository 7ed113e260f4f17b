"""Files and folders that appear whole or not at all, and the names of those that a run consists of.

Nothing that is not ours is ever removed or replaced: a finished folder carries `STAMP`, which lists what was written.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

RECIPE, RUN_STATE, REPORT, DOCTOR = "recipe.yaml", "run.json", "report.html", "doctor.json"
"""In a run's folder."""

METRICS, LOG, LINEAGE, CHECKPOINTS, LOGS = "metrics.json", "log.jsonl", "lineage.json", "checkpoints", "runs"
ROLLOUTS = "rollouts.jsonl"
"""In a stage's folder, beside its adapter; `runs` holds what trackers write (`trackers`, `report_to`)."""

ROWS = "rows.jsonl"
"""In the folder of a stage that samples: the rows that it kept, for the stages that read them."""

VOTES = "votes.jsonl"
"""In a run's folder: people's votes on its policies' replies."""

MANIFEST = "manifest.json"
"""In a checkpoint that is whole: what else lies in it."""

PROGRESS = "progress.json"
"""In the folder of a stage that trains: how far it is. No part of a finished one."""

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL_CONFIG = "config.json"
"""PEFT's own names: an adapter lies directly in its stage's folder."""

EVALUATION, RESULTS, SAMPLES, REWARDS, OVER_OPTIMISATION, AGGREGATE, BENCHMARKS = (
    "eval",
    "results.json",
    "samples.jsonl",
    "rewards.json",
    "overoptimisation.json",
    "aggregate.json",
    "benchmarks.json",
)
"""The evaluation's folder in that of the run, and what lies in it."""

EVAL_CACHE = "eval-cache"
"""Beside it: what an evaluation need not ask or draw again."""

STAMP = ".key.json"
"""In a finished folder, of a stage or of the evaluation: what it was made for, and what was written into it."""

_EVALUATED = {RESULTS, SAMPLES, REWARDS, OVER_OPTIMISATION, AGGREGATE, BENCHMARKS, STAMP, LOGS}
_LITTER = {".DS_Store", "Thumbs.db", ".ipynb_checkpoints", "lost+found"}
"""What file managers, notebooks and file systems leave anywhere, and nobody misses."""

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(-\d+)?")
"""What `write_whole` and `whole_folder` write to until it is complete."""


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
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """See that a file, or what a folder lists, survives a machine that stops now."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    try:
        handle = os.open(path, flags)
    except OSError:  # no folders on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # which disks say that cannot do so
            raise
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    """Hex SHA-256 of a file's bytes, read now (`models.cache.file_sha256` remembers it)."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_regular(file: Path) -> str:
    """The text of a file. Raises OSError where there is none, or something else, such as a pipe, for which one would
    wait."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return file.read_text(encoding="utf-8")


@contextmanager
def whole_folder(final: Path, ours: "Callable[[Path], bool] | None" = None) -> Generator[Path]:
    """An empty folder to fill; when the block ends well it takes the place of `final`, and an older one goes then.

    Where the block raises, `final` stays as it was.

    Args:
        ours: whether a folder that lies there may be replaced; None: `is_ours`.

    Raises:
        UserError: something lies there that we did not write.
    """
    beside = _free(final.with_name(f".{final.name}.{os.getpid()}"))
    beside.mkdir(parents=True)
    try:
        yield beside
        replace_folder(beside, final, ours)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(new: Path, final: Path, ours: Callable[[Path], bool] | None = None) -> None:
    """Move a finished folder to its place beside it; an older one of ours goes only then.

    What somebody put into the older one besides what we wrote is kept, in `NAME.before` beside it.
    """
    ours, old = ours or is_ours, final.with_name(f".{final.name}.old")
    if _lies(old):
        _remove(old, ours)
    if _lies(final):
        if not ours(final):
            raise UserError(str(final), "is not ours to replace", "move it away")
        _set_aside(final)
        final.rename(old)
    new.rename(final)
    if _lies(old):
        _remove(old, ours)


def finish_replacing(parent: Path) -> None:
    """Put right what a crash in `replace_folder` left behind: the older folder comes back unless the new one is there.

    Args:
        parent: the folder that they lie in; nobody else may be replacing folders in it.
    """
    for old in parent.glob(".*.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        if not is_ours(old):
            continue
        if not final.exists():
            old.rename(final)
        elif is_ours(final):
            _remove(old, is_ours)


def is_ours(folder: Path) -> bool:
    """Whether a folder is a stage's or an evaluation's that we wrote, or holds nothing: it may be replaced."""
    if not folder.is_dir():
        return False
    held = {each.name for each in folder.iterdir()} - _LITTER
    return not held or STAMP in held or {LINEAGE, ADAPTER_CONFIG} <= held or held <= _EVALUATED


def strangers(folder: Path) -> list[str]:
    """What lies in a finished folder and was not written into it by us, as far as its stamp says what was."""
    try:
        written = json.loads(read_regular(folder / STAMP))["holds"]
        known = {*written, *_LITTER, STAMP}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return sorted(each.name for each in folder.iterdir() if each.name not in known)


def sweep(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what a process that was killed left of files or folders that it had not finished.

    Args:
        names: of what is written there; a folder goes only if it holds nothing but an evaluation's files.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or found["name"] not in names or is_running(int(found["pid"])):
            continue
        if not path.is_symlink() and path.is_dir():
            if {each.name for each in path.iterdir()} <= _EVALUATED:
                shutil.rmtree(path, ignore_errors=True)
        elif path.is_file():
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether another process of that number is at work on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _set_aside(final: Path) -> None:
    found = strangers(final)
    if found:
        aside = _free(final.with_name(f"{final.name}.before"))
        aside.mkdir()
        for name in found:
            (final / name).rename(aside / name)


def _lies(path: Path) -> bool:
    """Whether anything is there, a link that leads nowhere included."""
    return path.is_symlink() or path.exists()


def _remove(folder: Path, ours: Callable[[Path], bool]) -> None:
    if folder.is_symlink():
        folder.unlink()  # what it points to lies elsewhere
    elif ours(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        raise UserError(str(folder), "is not ours to remove", "move it away")


def _free(wanted: Path) -> Path:
    """The path itself, or with a number behind it: nothing lies there."""
    number, path = 0, wanted
    while _lies(path):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. A line that a kill cut off is left out.

    Not `splitlines`: a text may hold other line ends, which JSON does not escape.
    """
    return json_objects(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else []


def json_objects(text: str) -> list[dict[str, Any]]:
    """The objects of JSON lines, also of a part that begins or ends within one: what is no whole line is left out."""
    rows: list[dict[str, Any]] = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
