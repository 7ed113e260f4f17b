"""One row of data, independent of the format that it came in."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# {"role": ..., "content": ...} and whatever else the format allows (name, tool_calls, tool_call_id, ...).
Message = dict[str, Any]
# What a file holds, before it is known what its fields mean.
RawRow = dict[str, Any]
# (origin: "file.jsonl:12" or "file.parquet: row 12", row)
Placed = tuple[str, RawRow]


@dataclass(frozen=True)
class Row:
    """One normalised row: everything is messages.

    prompt: the conversation before the reply, ending before an assistant's turn.
    completion: starts with an assistant's turn; a demonstration may go on with further turns.
    chosen, rejected: one assistant message each.
    label: True for a wanted completion, False for an unwanted one.
    margin: by how much chosen is better, where the data says so.
    tools: JSON schemas of the tools that the conversation may call.
    columns: all other columns, for reward functions and judges.
    origin: where the row came from, `file.jsonl:12`.
    """

    prompt: list[Message]
    completion: list[Message] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    label: bool | None = None
    margin: float | None = None
    tools: list[Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    origin: str = ""

    @cached_property
    def key(self) -> str:
        """`prompt_key` of its prompt, made once."""
        return prompt_key(self.prompt)


class Unusable(Exception):
    """A valid row that cannot be used: it is dropped, and counted under `reason`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def text_message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


# One encoder for all rows: `json.dumps` makes a new one at every call that is given options.
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def canonical(value: object) -> str:
    """`value` as JSON that is independent of key order; types that JSON lacks (dates, bytes) as `str`."""
    return _ENCODER.encode(value)


def prompt_key(prompt: list[Message]) -> str:
    """A text that is equal for equal prompts, ignoring white space around a message's text."""
    tidy = [{**m, "content": m["content"].strip()} if isinstance(m.get("content"), str) else m for m in prompt]
    return canonical(tidy)


def content_of(row: Row) -> bytes:
    """All that the row says, whatever the place that it was read from."""
    content = [row.prompt, row.completion, row.chosen, row.rejected, row.label, row.margin, row.tools, row.columns]
    return (canonical(content) + "\n").encode("utf-8", "surrogatepass")


class Fingerprint:
    """sha256 of rows' content in order, independent of where they were read from; a row at a time."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: Row) -> None:
        self.update(content_of(row))

    def update(self, content: bytes) -> None:
        """The next row, by what `content_of` says of it."""
        self._digest.update(content)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def fingerprint(rows: Iterable[Row]) -> str:
    """The `Fingerprint` of all these rows."""
    digest = Fingerprint()
    for row in rows:
        digest.add(row)
    return digest.hexdigest()
