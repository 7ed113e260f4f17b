"""The data that a stage asks for: one or several sources, limits, and what happens beyond them."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UserError, nearest

RowKind = Literal["demo", "pair", "label", "prompt"]
Overflow = Literal["drop", "truncate", "error"]
Answer = Literal["error", "drop", "keep"]

# The names that `columns` may map from: ours on the left, the file's on the right.
OUR_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "label", "margin", "system", "tools")


@dataclass(frozen=True)
class SourceSpec:
    """One place to read rows from.

    path: a file (.jsonl, .json, .csv, .tsv, .parquet, each also .gz), a folder of such files, a folder written by
        `datasets.save_to_disk`, or the id of a dataset on the hub.
    split: the split of a dataset; by default `train` if there is one.
    weight: this source's share of the mixture, relative to the other sources' weights (see `load.load_rows`).
    columns: maps our field names to the file's, for those that are not recognised.
    limit: use only that many rows, the first usable ones.
    name, revision: of a dataset on the hub.
    streaming: of a dataset on the hub, read it while it comes: nothing of it is kept on disk.
    """

    path: str
    split: str | None = None
    weight: float = 1.0
    columns: dict[str, str] | None = None
    limit: int | None = None
    name: str | None = None
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(self.path, f"weight is {self.weight}, expected more than 0", "leave the source out instead")
        _positive(self.path, "limit", self.limit)
        for ours in self.columns or {}:
            if ours not in OUR_COLUMNS:
                said = f"columns maps the unknown name {ours!r} (ours come first)"
                raise UserError(self.path, said, nearest(ours, OUR_COLUMNS))


@dataclass(frozen=True)
class OnProblem:
    """What becomes of a row with something wrong, by the kind of problem: an error, dropped and counted, or kept.

    malformed: it cannot be read as a row: broken JSON, no object, a field that is missing or holds something else.
    template: the chat template refuses its conversation, or leaves out what it says.
    unusable: it can be read, and nothing is to be learnt from it: an empty prompt or reply, two equal sides, a tie.
    repeated: its prompt has been seen before.

    Every problem is counted and named with its file and line; rows that are too long follow `DataSpec.overflow`.
    """

    malformed: Answer = "error"
    template: Answer = "error"
    unusable: Answer = "drop"
    repeated: Answer = "keep"

    def __post_init__(self) -> None:
        for name, allowed in ANSWERS.items():
            if (said := getattr(self, name)) not in allowed:
                remedy = f"use {' or '.join(allowed)}"
                raise UserError(f"data.on_problem.{name}", f"{said!r} is not possible", remedy)


ANSWERS: dict[str, tuple[Answer, ...]] = {
    "malformed": ("error", "drop"),
    "template": ("error", "drop"),
    "unusable": ("drop", "error"),
    "repeated": ("keep", "drop", "error"),
}
"""What may become of a row, by the kind of problem; the default first."""


@dataclass(frozen=True)
class DataSpec:
    """The data of one stage.

    max_prompt_length, max_length: tokens of the prompt, and of prompt and reply together.
    overflow: what becomes of a row beyond them: dropped and counted, truncated and counted, or an error.
    limit: rows in all, after mixing.
    held_out: fraction of the prompts kept out of training (see `split.split_rows`).
    system: a system message for the rows that have none.
    on_problem: what becomes of rows with something wrong.
    """

    sources: tuple[SourceSpec, ...]
    max_prompt_length: int | None = None
    max_length: int | None = 1024
    overflow: Overflow = "drop"
    limit: int | None = None
    held_out: float = 0.0
    seed: int = 0
    system: str | None = None
    on_problem: OnProblem = OnProblem()

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data", "no source is given", "name at least one path")
        if self.overflow not in get_args(Overflow):
            raise UserError("data.overflow", f"{self.overflow!r} is unknown", "use drop, truncate or error")
        if not 0 <= self.held_out < 1:
            raise UserError("data.held_out", f"{self.held_out} is no fraction", "use a number from 0 to below 1")
        for name in ("max_prompt_length", "max_length", "limit"):
            _positive("data", name, getattr(self, name))

    def describe(self) -> str:
        """The sources' paths in one line, for logs and lineage."""
        return " + ".join(source.path for source in self.sources)


def _positive(where: str, name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(where, f"{name} is {value}, expected at least 1", f"give a whole number or leave {name} out")
