"""PPO's prompts: any TRL-style dataset as token ids, and the endless shuffled stream that iterations draw from."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .scorers import Prompt

_OURS = ("prompt", "prompt_ids", "columns")


@dataclass(frozen=True)
class Prompts:
    """ids: token ids, ready to be answered. prompts: text or messages. columns: what reward functions also get."""

    ids: list[list[int]]
    prompts: list[Prompt]
    columns: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, dataset: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> "Prompts":
        """From rows with `prompt` (text, or a list of messages) or `prompt_ids` made beforehand; others are columns.

        Raises:
            UserError: no row, a row without a prompt, or an empty one.
        """
        ids: list[list[int]] = []
        prompts: list[Prompt] = []
        columns: list[dict[str, Any]] = []
        for number, row in enumerate(dataset):
            if "prompt" not in row and "prompt_ids" not in row:
                raise UserError(
                    f"train_dataset row {number}",
                    f"its columns are {', '.join(row)}, expected 'prompt' or 'prompt_ids'",
                    "rename the prompt's column",
                )
            tokens = list(row["prompt_ids"]) if "prompt_ids" in row else _encode(row["prompt"], tokenizer)
            if not tokens:
                raise UserError(f"train_dataset row {number}", "the prompt is empty", "remove the row")
            ids.append(tokens)
            prompts.append(row["prompt"] if "prompt" in row else str(tokenizer.decode(tokens)))
            extra = json.loads(row["columns"]) if isinstance(row.get("columns"), str) else {}
            columns.append({**extra, **{name: value for name, value in row.items() if name not in _OURS}})
        if not ids:
            raise UserError("train_dataset", "it has no row", "give at least one prompt")
        return cls(ids, prompts, columns)

    def take(self, rows: Sequence[int]) -> "Prompts":
        """The given rows, in that order."""
        return Prompts([self.ids[i] for i in rows], [self.prompts[i] for i in rows], [self.columns[i] for i in rows])

    def column_lists(self) -> dict[str, list[Any]]:
        """Columns as lists, None where a row has none: what a reward function is called with."""
        names = dict.fromkeys(name for row in self.columns for name in row)
        return {name: [row.get(name) for row in self.columns] for name in names}


def stream_rows(size: int, seed: int, start: int, count: int) -> list[int]:
    """Positions start .. start + count - 1 of the endless stream of permutations of `size` rows.

    A function of its arguments alone, so a resumed run needs to know its position and nothing else.
    """
    orders: dict[int, list[int]] = {}
    rows = []
    for position in range(start, start + count):
        lap, place = divmod(position, size)
        if lap not in orders:
            generator = torch.Generator().manual_seed(seed_of(seed, "prompts", lap))
            orders[lap] = torch.randperm(size, generator=generator).tolist()
        rows.append(orders[lap][place])
    return rows


def seed_of(*parts: int | str) -> int:
    """A seed below 2^56 named by its parts: streams with different names share nothing."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    from ..data.template import prompt_ids

    return list(prompt_ids(tokenizer, prompt))
