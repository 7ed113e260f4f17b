"""Rows as in Stanford Alpaca: an `instruction`, with optional `input` (or `context`) and `history`."""

from typing import Any

from .fields import COMPLETION_NAMES, PROMPT_NAMES
from .messages import to_messages
from .rows import Message, RawRow, text_message
from .spec import RowKind

_INPUTS = ("input", "context")
_OTHER_PROMPTS = set(PROMPT_NAMES) - {"instruction", *_INPUTS}


def is_alpaca(raw: RawRow, kind: RowKind) -> bool:
    """Whether the row has an instruction, which is the prompt of the rows of this kind."""
    fields = {name for name, value in raw.items() if value is not None}
    if "instruction" not in fields or fields & _OTHER_PROMPTS:
        return False
    pair, reply = fields >= {"chosen", "rejected"}, bool(fields & set(COMPLETION_NAMES))
    match kind:
        case "prompt":
            return True
        case "pair":
            return pair
        case "label":
            return reply if "label" in fields else pair
        case "demo":
            return reply or "chosen" in fields


def alpaca_as_ours(raw: RawRow, kind: RowKind, origin: str) -> RawRow:
    """The row with its history, instruction and input as the messages of `prompt`.

    Raises:
        UserError: the instruction is neither text nor messages.
    """
    rest, instruction = dict(raw), raw["instruction"]
    del rest["instruction"]
    messages = to_messages(instruction, "user", origin, "instruction")
    extra = next((name for name in _INPUTS if isinstance(raw.get(name), str)), None)
    if extra is not None and isinstance(instruction, str):
        parts = [part for part in (instruction, rest.pop(extra)) if part.strip()]
        messages = [text_message("user", "\n\n".join(parts))]
    return rest | {"prompt": _history(rest) + messages}


def _history(rest: dict[str, Any]) -> list[Message]:
    """The turns before the instruction, written as [question, answer] pairs; they are removed from the row."""
    turns = rest.pop("history") if rest.get("history") else []
    return [text_message(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
