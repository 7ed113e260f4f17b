"""One field's value (text, a message, a list of messages, a ShareGPT list) -> a list of messages."""

import json
from typing import Any

from ..errors import UserError
from .hh import is_dialogue, parse_dialogue
from .rows import Message, text_message

# ShareGPT's speakers, and the names that others gave them.
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "tool": "tool",
    "ipython": "tool",
}


def to_messages(value: object, role: str, where: str, field: str) -> list[Message]:
    """`value` as messages: a plain text becomes one message of `role`, an HH dialogue one message per turn.

    Raises:
        UserError: it is neither text nor messages.
    """
    if isinstance(value, str):
        return parse_dialogue(value) if is_dialogue(value) else [text_message(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise UserError(
            where, f"the field {field!r} is {_kind(value)}, expected text or a list of messages", "correct the row"
        )
    return [_message(item, where, f"{field}[{i}]") for i, item in enumerate(value)]


def _message(item: object, where: str, field: str) -> Message:
    if isinstance(item, dict) and "role" in item:
        return _chat_message(item, where, field)
    if isinstance(item, dict) and "from" in item and "value" in item:
        return _sharegpt_message(item, where, field)
    found = f"an object with {', '.join(item) or 'no field'}" if isinstance(item, dict) else _kind(item)
    raise UserError(
        where, f"{field} is {found}, expected a message with role and content (or from and value)", "correct the row"
    )


def _chat_message(item: dict[str, Any], where: str, field: str) -> Message:
    # Arrow files fill what a message lacks with nulls: what is null was never said.
    message = {name: without_nulls(value) for name, value in item.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise UserError(where, f"{field} has the role {item['role']!r}, expected a name", "correct the row")
    message["content"] = _content(message.get("content"), where, field)
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    return message


def _content(content: object, where: str, field: str) -> str:
    """The content as text: text parts are joined, and no content (beside a tool call) is the empty text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise UserError(where, f"{field} holds {_kind(content)} that is not text", "only text messages can be trained on")


def _sharegpt_message(item: dict[str, Any], where: str, field: str) -> Message:
    speaker, value = str(item["from"]).lower(), item["value"]
    if speaker in ("function_call", "tool_call"):
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, where, field)}
    if speaker not in _ROLES:
        raise UserError(
            where, f"{field} is from {item['from']!r}, expected one of {', '.join(_ROLES)}", "rename the speaker"
        )
    return text_message(_ROLES[speaker], _content(value, where, field))


def _calls(value: object, where: str, field: str) -> list[dict[str, Any]]:
    """Tool calls, which ShareGPT writes as JSON text, one or a list: {"name": ..., "arguments": {...}}."""
    calls = parsed(value, where, field)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(where, f"{field} is no function call", 'write {"name": ..., "arguments": {...}}')
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def to_tools(value: object, where: str) -> list[Any] | None:
    """The tools' JSON schemas, read from JSON if they are a text; None if there are none."""
    if value is None or value == "":
        return None
    tools = without_nulls(parsed(value, where, "tools"))
    if not isinstance(tools, list):
        raise UserError(where, f"tools is {_kind(tools)}, expected a list of JSON schemas", "correct the row")
    return tools or None


def parsed(value: object, where: str, field: str) -> Any:
    """The value of a JSON text; anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        problem = f"{field} is not JSON ({error.msg} at column {error.colno})"
        raise UserError(where, problem, "correct the row") from error


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _kind(value: object) -> str:
    return {"NoneType": "null", "str": "text", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )
