"""Generations with their scores, one JSON object a line, every few iterations."""

import json
import logging
from pathlib import Path
from typing import Any

from .callbacks import keep_rows

logger = logging.getLogger(__name__)


class SampleLog:
    """Writes `rollouts.jsonl`.

    Args:
        path: the file.
        every: iterations between two writings; 0: never.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def start(self, iteration: int) -> None:
        """The run stands before `iteration`: rows of it and of later ones, left by an interrupted run, go."""
        if not self.every or not self.path.exists():
            return
        keep_rows(self.path, lambda row: row["iteration"] < iteration)

    def write(self, iteration: int, samples: list[dict[str, Any]]) -> None:
        """Write an iteration's samples, if it is one that is written, and show the first."""
        if not self.every or iteration % self.every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in samples:
                file.write(json.dumps({"iteration": iteration, **row}, ensure_ascii=False) + "\n")
        for row in samples[:1]:
            logger.info("iteration %d, score %.3g: %r", iteration, row["score"], row["completion"][:200])
