"""Runs works one after the other against the clock, and keeps what each has found as soon as it has.

A work is a process of its own. It writes a line of JSON for every figure, so that one that is cut off leaves those that
it had; the file is whole at every moment, and a second run does what is missing in it.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...files import write_whole
from ..measure import Measured
from .works import Work

LEAST = 20.0
"""Seconds without which no work is begun: a process has hardly imported its libraries in less."""
SAID = 1500
"""Characters of what a work said before it failed that are kept."""


@dataclass
class Findings:
    """What is known of one card, and its file.

    Attributes:
        machine: the card and the versions.
        found: figures by key. failed: by a work's title, why it has not found all of its own.
    """

    file: Path
    machine: dict[str, Any]
    found: dict[str, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, machine: dict[str, Any], *, beside: Path | None = None) -> "Findings":
        """Those of an earlier run, from `file` or else from `beside`; empty where there are none of this machine's
        device and versions."""
        for each in (file, beside):
            if each is not None and each.is_file():
                kept = json.loads(each.read_text(encoding="utf-8"))
                if all(kept["machine"].get(name) == machine.get(name) for name in ("device", "versions", "preftune")):
                    return cls(file, kept["machine"], kept["found"], kept["failed"])
        return cls(file, machine)

    def keep(self, key: str, figures: Measured) -> None:
        """One more figure, in the file at once."""
        self.found[key] = figures
        self.write()

    def write(self) -> None:
        """The file as it should be."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"machine": self.machine, "found": self.found, "failed": self.failed}
        write_whole(self.file, json.dumps(kept, indent=2) + "\n")

    def missing(self, work: Work) -> list[str]:
        """The names of a work's figures that are not there."""
        return [name for name, key in zip(work.names, work.keys, strict=True) if key not in self.found]


def run(works: Sequence[Work], findings: Findings, seconds: float | None) -> list[Work]:
    """Do what is missing, in that order, until the time is over; the works that are not done.

    A work for which too little time is left is passed by: a shorter one may still fit.
    """
    began = time.monotonic()
    findings.write()
    for work in works:
        names = findings.missing(work)
        left = float("inf") if seconds is None else seconds - (time.monotonic() - began)
        if not names or left < min(LEAST, work.seconds):
            continue
        said = f"[{time.monotonic() - began:.0f} s] {work.title}"
        print(said, file=sys.stderr, flush=True)
        findings.failed.pop(work.title, None)
        why = _do(work, names, findings, min(work.seconds, left))
        if why is not None:
            findings.failed[work.title] = why
            findings.write()
            print(f"  {why}", file=sys.stderr, flush=True)
    return [work for work in works if findings.missing(work)]


def command(work: Work, names: Sequence[str]) -> list[str]:
    """The process that finds those figures of a work."""
    return [sys.executable, "-W", "ignore", "-m", f"{__package__}.worker", json.dumps(asdict(work)), *names]


def _do(work: Work, names: Sequence[str], findings: Findings, seconds: float) -> str | None:
    """Run one work; why it has not found all that it should, or None."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command(work, names),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            # so that what it has started ends with it
            start_new_session=True,
        )
        try:
            for line in _lines(process, seconds):
                name, figures = json.loads(line)
                findings.keep(f"{work.about}: {name}", figures)
                print(f"  {name}: {json.dumps(figures)[:200]}", file=sys.stderr, flush=True)
            code = process.wait(LEAST)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        said.seek(0)
        last = said.read()[-SAID:].strip()
    if not (left := findings.missing(work)):
        return None
    how = f"cut off after {seconds:.0f} s" if code is None else f"ended with exit code {code}"
    return f"{how} without {', '.join(left)}" + (f"; it said: {last}" if last else "")


def _lines(process: "subprocess.Popen[str]", seconds: float) -> Iterator[str]:
    """What a process writes, line by line; raises subprocess.TimeoutExpired once its time is over."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as out:
            for line in out:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    until = time.monotonic() + seconds
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise subprocess.TimeoutExpired(process.args, seconds) from None
        if line is None:
            return
        yield line


def _end(process: "subprocess.Popen[str]") -> None:
    """With all that it has started, if it is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
