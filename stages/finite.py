"""Numbers that are not finite end a stage in words: from them on every weight is one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

_SHOWN = 3
_REMEDY = "look at these rows; a lower learning rate or dtype float32 may help"


@dataclass
class Skips:
    """How many steps a stage may leave out because a number is not finite, and how many it has.

    allowed: 0: the first ends the stage. logged: of those done, how many the log has said.
    """

    allowed: int = 0
    done: int = 0
    logged: int = 0

    def take(self) -> bool:
        """Whether one more may be left out; if so, it is counted."""
        if self.done >= self.allowed:
            return False
        self.done += 1
        return True

    def said(self) -> dict[str, int]:
        """What the next entry of the log says of them: nothing, unless there are new ones."""
        new, self.logged = self.done - self.logged, self.done
        return {"nonfinite_skipped": self.done} if new else {}


def not_finite(
    where: str, step: int, what: str, value: float, rows: str, *, skips: Skips | None = None, good: str | None = None
) -> UserError:
    """The error of a loss or of gradients that are NaN or infinite.

    Args:
        step: the optimiser step under way, counted from 1.
        rows: what it was computed from, in words.
        skips: those before it.
        good: the last checkpoint, which is of a step whose numbers were finite.
    """
    said = f"step {step}: {what} is {value} on {rows}"
    if skips is not None and skips.done:
        said += f", after {skips.done} steps that were left out"
    if good is not None:
        said += f" (last good checkpoint: {good})"
    more = "" if skips is not None and skips.allowed else ", and on_nonfinite: skip(N) leaves out up to N such steps"
    return UserError(where, said, _REMEDY + more)


def rows_of(batch: Mapping[str, Any], dataset: Any, origins: Sequence[str]) -> str:
    """Where the rows of a batch come from, as `pairs.jsonl:3, pairs.jsonl:9`; found by their token ids.

    Args:
        batch: what a collator made of some rows of the dataset.
        origins: of the dataset's rows, in its order.
    """
    if dataset is None or len(origins) != len(dataset):
        return "rows of unknown origin"
    wanted = [ids for name, value in batch.items() if name.endswith("input_ids") for ids in value.tolist()]
    found = []
    for index, origin in enumerate(origins):
        row = dataset[index]
        texts = [row["input_ids"]] if "input_ids" in row else []
        replies = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
        texts += [row["prompt_ids"] + row[name] for name in replies]
        if any(ids[: len(text)] == text for ids in wanted for text in texts):
            found.append(origin)
    shown = ", ".join(found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"the rows {shown}{more}" if found else "rows of unknown origin"
