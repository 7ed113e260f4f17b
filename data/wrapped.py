"""Rows whose prompt is an object that holds the conversation and its tools, as in OpenAI's preference data.

{"input": {"messages": [...], "tools": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
"""

from .fields import PROMPT_NAMES
from .rows import RawRow
from .spec import RowKind

_SIDES = {"preferred_output": "chosen", "non_preferred_output": "rejected"}


def is_wrapped(raw: RawRow, kind: RowKind) -> bool:
    """Whether a field that names the prompt holds an object with `messages`."""
    return _name(raw) is not None


def wrapped_as_ours(raw: RawRow, kind: RowKind, origin: str) -> RawRow:
    """The row with the conversation as `prompt`, the tools beside it, and the sides under our names."""
    name = _name(raw)
    if name is None:
        return raw
    inner = raw[name]
    rest = {_SIDES.get(key, key): value for key, value in raw.items() if key != name}
    tools = {"tools": inner["tools"]} if inner.get("tools") and not raw.get("tools") else {}
    return rest | {"prompt": inner["messages"]} | tools


def _name(raw: RawRow) -> str | None:
    held = (name for name in PROMPT_NAMES if isinstance(raw.get(name), dict))
    return next((name for name in held if isinstance(raw[name].get("messages"), list)), None)
