"""Encoded rows, made once and kept in the user's cache for every stage and every run with the same needs.

The same needs are: sources with the same content under the same paths, the same tokenizer and template, the same
settings of the data entry, the same code and libraries that encode. Each set of rows is a folder `rows/KEY` of the
cache, which appears whole or not at all; the least recently used go once all together take more than `LIMIT` gigabytes.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import encode
from ..data.encode import Shape, encode_demos, encode_labels, encode_pairs, encode_prompts, encode_replies
from ..data.sources import files_of, find
from ..data.spec import SourceSpec
from ..data.store import ABOUT, FORMAT, Stored, describe, files, open_stored
from ..data.stream import Task, encode_sources
from ..data.template import Templater
from ..errors import UserError
from ..models.cache import build_once, file_sha256
from ..models.lineage import tokenizer_info
from .job import StageJob

SHAPES: dict[Any, Shape] = {
    encode_demos: "demo",
    encode_pairs: "pair",
    encode_labels: "label",
    encode_prompts: "prompt",
    encode_replies: "reply",
}
"""What the data room's encoders make of rows; the rows of any other are encoded by it, and not kept."""

FOLDER = "rows"
LIMIT = 20.0
"""Gigabytes that all encoded rows together may take in the cache, unless PREFTUNE_CACHE_ROWS_GB says otherwise."""
_USED_LATELY = 24 * 3600
"""Seconds: what has been used within them is not removed, whatever it takes."""
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def encoded_rows(job: StageJob, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> Stored:
    """The job's rows in that shape: found in the cache, or made and left there.

    Raises:
        UserError: as `encode_sources`; the sources changed while they were read.
    """
    task = Task(job.data, job.rows, shape, tokenizer)
    contents = _contents(job)
    key = None if contents is None else rows_key(task, contents)

    def make(folder: Path) -> None:
        with files(folder) as sinks:
            streamed = encode_sources(task, job.folders, f"data.{job.data_name}", sinks)
        describe(folder, streamed)
        if key is not None and _contents(job) != contents:
            said = "changed while it was read"
            raise UserError(job.data.describe(), said, "run it again once nobody writes to it")

    if key is None:
        return _kept_for_now(make)
    # one that a full disk or a stopped machine cut short is encoded anew
    folder = build_once(key, make, within=FOLDER, whole=lambda each: open_stored(each) is not None)
    if (stored := open_stored(folder)) is None:
        raise UserError(str(folder), "cannot be read back", "set PREFTUNE_CACHE to a folder of a sound disk")
    with suppress(OSError):
        os.utime(folder / ABOUT)
    trim(folder)
    return stored


_FOR_NOW: list[tempfile.TemporaryDirectory[str]] = []
"""Rows that nobody else can use; they go with this process."""


def _kept_for_now(make: Any) -> Stored:
    made = tempfile.TemporaryDirectory(prefix="preftune-rows-", ignore_cleanup_errors=True)
    _FOR_NOW.append(made)
    make(Path(made.name))
    stored = open_stored(Path(made.name))
    assert stored is not None
    return stored


def _contents(job: StageJob) -> list[Any] | None:
    """What the job's sources hold; None where one's content has no name."""
    found = [_content(source, job.folders) for source in job.data.sources]
    return None if None in found else found


def rows_key(task: Task, contents: list[Any]) -> str:
    """Everything that encoded rows depend on, as a hash; `contents` is what the sources hold."""
    tokenizer: Any = task.tokenizer
    template = Templater(tokenizer)
    parts = {
        "format": FORMAT,
        "code": _code(),
        "versions": {name: version(name) for name in _LIBRARIES},
        "data": asdict(task.spec),
        "kind": task.kind,
        "shape": task.shape,
        "sources": contents,
        "tokenizer": tokenizer_info(tokenizer),
        "class": type(tokenizer).__name__,
        # as it is written today, and what the tokenizer's own state adds
        "template": [template.template, tokenizer.chat_template, template.add_bos, template.bos, template.eos],
        "added": [bool(getattr(tokenizer, "split_special_tokens", False)), tokenizer.get_added_vocab()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _content(source: SourceSpec, folders: Sequence[Path]) -> list[Any] | None:
    """What a source holds, by its files or its commit on the hub."""
    found = files_of(source, folders)
    if found is None:
        commit = _commit(source)
        return None if commit is None else ["hub", commit]
    root = find(source.path, folders)
    assert root is not None
    return [[file.relative_to(root).as_posix(), file_sha256(file)] for file in found]


def _commit(source: SourceSpec) -> str | None:
    """The commit that a revision of a dataset on the hub stands for; None where nobody can be asked."""
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.path, revision=source.revision, timeout=10).sha
    except Exception:  # offline, gated, unknown: whoever reads it says so
        return None


def _code() -> str:
    """A hash of the code that reads and encodes rows: another version of it encodes them anew."""
    room = Path(encode.__file__).parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(room.glob("*.py")))).hexdigest()


def limit_bytes() -> float:
    """How much all encoded rows may take in the cache.

    Raises:
        UserError: the environment says no number.
    """
    said = os.environ.get("PREFTUNE_CACHE_ROWS_GB", str(LIMIT))
    try:
        return float(said) * 1e9
    except ValueError:
        raise UserError("PREFTUNE_CACHE_ROWS_GB", f"{said!r} is no number", "write gigabytes, such as 20") from None


def trim(keep: Path) -> None:
    """Remove what was used least recently while all rows take more than they may.

    Args:
        keep: the folder that is in use now.
    """
    most, now = limit_bytes(), time.time()
    found = []
    for about in keep.parent.glob(f"*/{ABOUT}"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            found.append((about.stat().st_mtime, size, about.parent))
    for left in keep.parent.glob(".*.partial-*"):
        with suppress(OSError):  # of a process that was killed, unless it is written right now
            if now - left.stat().st_mtime > _USED_LATELY:
                shutil.rmtree(left, ignore_errors=True)
    total = sum(size for _, size, _ in found)
    for used, size, folder in sorted(found):
        if total <= most:
            return
        if folder != keep and now - used > _USED_LATELY:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
