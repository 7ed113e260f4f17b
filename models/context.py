"""Rows against the length that the base can read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ..errors import UserError
from .auto import open_config
from .base import Base


def context_length(base: Base) -> int | None:
    """How many positions the base was made for; None where its config names no limit (ALiBi, state-space models)."""
    return positions(open_config(base.path))


def positions(config: PreTrainedConfig) -> int | None:
    """The same by a model's config."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(config, "alibi", False):
        return None
    # Some configs give the length before it was stretched, and by how much.
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    stretched = factor * rope.get("original_max_position_embeddings", limit) if isinstance(factor, int | float) else 0
    return max(limit, int(stretched))


def check_context(dataset: Any, base: Base, where: str, new_tokens: int = 0) -> None:
    """Refuse rows that are longer than the base's context.

    Past its last position a model with learned positions fails, and one with rotary positions goes on in silence with
    what it was never trained for.

    Args:
        dataset: encoded rows of any kind.
        where: the data's place, for the message.
        new_tokens: what is sampled after a prompt.

    Raises:
        UserError: how many rows are too long, and the longest.
    """
    check = ContextCheck(base, new_tokens)
    check.add_all(_lengths(dataset))
    check.raise_found(where, len(dataset))


class ContextCheck:
    """The same, a row at a time.

    Attributes:
        longest: so many tokens a row may have; None: as many as it likes.
    """

    def __init__(self, base: Base, new_tokens: int = 0) -> None:
        self._limit, self._new_tokens = context_length(base), new_tokens
        self.longest = None if self._limit is None else self._limit - new_tokens
        self._beyond, self._most = 0, 0

    def add(self, length: int) -> None:
        """A row of so many tokens."""
        if self.longest is not None and length > self.longest:
            self._beyond, self._most = self._beyond + 1, max(self._most, length + self._new_tokens)

    def add_all(self, lengths: "np.ndarray[Any, Any]") -> None:
        """Rows of so many tokens."""
        if self.longest is not None and (beyond := lengths[lengths > self.longest]).size:
            self._beyond, self._most = self._beyond + beyond.size, max(self._most, int(beyond.max()) + self._new_tokens)

    def raise_found(self, where: str, rows: int) -> None:
        """Refuse the rows that are too long.

        Args:
            rows: how many there are in all.

        Raises:
            UserError: as `check_context`.
        """
        if self._limit is None or not self._beyond:
            return
        with_reply = f" with {self._new_tokens} new tokens" if self._new_tokens else ""
        raise UserError(
            where,
            f"{self._beyond} of {rows} rows are longer{with_reply} than the base's context of {self._limit} positions "
            f"(the longest: {self._most} tokens)",
            f"set {'max_prompt_length' if self._new_tokens else 'max_length'}: "
            f"{max(1, self._limit - self._new_tokens)}",
        )


def row_length(row: Mapping[str, Sequence[int]]) -> int:
    """Tokens of an encoded row of any kind: of a pair, the longer side with its prompt."""
    if "input_ids" in row:
        return len(row["input_ids"])
    replies = [len(row[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
    return len(row["prompt_ids"]) + max(replies, default=0)


def _lengths(dataset: Any) -> "np.ndarray[Any, Any]":
    """`row_length` of each row."""
    columns = set(dataset.column_names)
    if "input_ids" in columns:
        return column_lengths(dataset, ["input_ids"])
    replies = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns]
    longest = [column_lengths(dataset, [name]) for name in replies]
    return column_lengths(dataset, ["prompt_ids"]) + (np.max(longest, axis=0) if longest else 0)


def column_lengths(dataset: Any, columns: Sequence[str]) -> "np.ndarray[Any, Any]":
    """Tokens of each row in these columns together, read without making a Python list of any, or a copy of the rows."""
    table = dataset.select_columns(list(columns)).with_format("arrow")[:]
    none = np.zeros(0, np.int64)
    counted = [
        np.concatenate([none, *(np.diff(each.offsets.to_numpy()) for each in table[name].chunks)]) for name in columns
    ]
    return np.sum(counted, axis=0)
