"""One field's value (text, a message, a list of messages, a ShareGPT list) -> a list of messages."""

import ast
import json
from typing import Any

from ..errors import UserError
from .hh import is_dialogue, parse_dialogue
from .rows import Message, text_message

# The names that data give the speakers, in `role` as in `from`. A name that is not here is kept: whether the chat
# template knows it shows when the row is rendered.
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "instruction": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
# Turns of the assistant whose content is a call, as ShareGPT and ms-swift write them.
_CALLS = ("function_call", "tool_call", "tool_calls")
# With which keys data say that a turn is not to be trained on (OpenAI, axolotl, ms-swift).
_MASKS = ("weight", "train", "loss")
_MOST_PRINTED = 1 << 20
"""Characters of a printed list that Python's parser is asked to read: it takes a hundred times as much memory."""
TRAINS = "train"
"""A message that holds `TRAINS: False` is read, and not trained on."""


def to_messages(value: object, role: str, where: str, field: str) -> list[Message]:
    """`value` as messages: a plain text becomes one message of `role`, an HH dialogue one message per turn.

    Raises:
        UserError: it is neither text nor messages.
    """
    if isinstance(value, str):
        written = written_messages(value)
        if written is None:
            return parse_dialogue(value) if is_dialogue(value) else [text_message(role, value)]
        value = written
    if isinstance(value, dict):
        # OpenAI's preference data: {"messages": [...], "tools": [...]}
        value = value["messages"] if isinstance(value.get("messages"), list) else [value]
    if not isinstance(value, list):
        raise UserError(
            where, f"the field {field!r} is {_kind(value)}, expected text or a list of messages", "correct the row"
        )
    return _together([_message(item, where, f"{field}[{i}]") for i, item in enumerate(value)])


def written_messages(text: str) -> list[Any] | None:
    """The messages that a text holds as JSON, or as Python prints a list of them; None if it holds none."""
    if "{" not in text:
        return None
    bare = text.strip()
    if not (bare.startswith(("[{", "[ {", "[\n")) and bare.endswith("]")):
        return None
    try:
        value = json.loads(bare)
    except RecursionError:
        return None
    except ValueError:
        if len(bare) > _MOST_PRINTED:
            return None
        try:
            value = ast.literal_eval(bare)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    messages = isinstance(value, list) and value and all(isinstance(each, dict) and _speaks(each) for each in value)
    return value if messages else None


def _speaks(item: dict[str, Any]) -> bool:
    return "role" in item or ("from" in item and "value" in item)


def _together(messages: list[Message]) -> list[Message]:
    """Calls that stand in turns of their own, one after the other, as the one turn that makes them all."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else {}
        follows = all("tool_calls" in each and not each["content"] for each in (message, last)) if joined else False
        if follows and last["role"] == message["role"] and message.get(TRAINS) == last.get(TRAINS):
            joined[-1] = last | {"tool_calls": [*last["tool_calls"], *message["tool_calls"]]}
        else:
            joined.append(message)
    return joined


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
    speaker = message["role"].strip().lower()
    if speaker in _CALLS:
        return _calling(message.get("content"), where, field) | _mask(message, where, field)
    message["role"] = _ROLES.get(speaker, message["role"])
    message["content"] = _content(message.get("content"), where, field)
    calls = message.pop("tool_calls", None) or []
    legacy = message.pop("function_call", None)
    if legacy is not None:
        calls = [*calls, legacy]
    if calls:
        message["tool_calls"] = _calls(calls, where, f"{field}.tool_calls")
    return {name: value for name, value in message.items() if name not in _MASKS} | _mask(message, where, field)


def _mask(message: dict[str, Any], where: str, field: str) -> Message:
    """{TRAINS: False} if the message says that it is not to be trained on.

    Raises:
        UserError: it says something between yes and no.
    """
    for name in _MASKS:
        if (said := message.get(name)) is None:
            continue
        word = str(said).strip().lower()
        if word in ("0", "0.0", "false"):
            return {TRAINS: False}
        if word not in ("1", "1.0", "true"):
            problem = f"{field} has {name}: {said!r}, expected 0 or 1 (false or true)"
            raise UserError(where, problem, f"write 0 for a turn that is not trained on, or leave {name} out")
    return {}


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
    speaker, value = str(item["from"]).strip().lower(), item["value"]
    if speaker in _CALLS:
        return _calling(value, where, field) | _mask(item, where, field)
    if speaker not in _ROLES:
        raise UserError(
            where, f"{field} is from {item['from']!r}, expected one of {', '.join(_ROLES)}", "rename the speaker"
        )
    return text_message(_ROLES[speaker], _content(value, where, field)) | _mask(item, where, field)


def _calling(value: object, where: str, field: str) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": _calls(value, where, field)}


def _calls(value: object, where: str, field: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates want them: each a `function` whose arguments are an object, not JSON text.

    Data write them as JSON text, one or a list, with the name and the arguments outside or inside a `function`.
    """
    calls = parsed(value, where, field)
    return [_call(call, where, field) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: object, where: str, field: str) -> dict[str, Any]:
    call = parsed(call, where, field)
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError(where, f"{field} is no function call", 'write {"name": ..., "arguments": {...}}')
    given = inner.get("arguments", inner.get("parameters", {}))
    # an empty text is how some APIs write "no arguments"
    arguments = parsed(given, where, f"{field}.arguments") if given != "" else {}
    outer = {name: value for name, value in call.items() if name in ("id", "type")}
    function = {"name": inner["name"], "arguments": {} if arguments is None else arguments}
    return {"type": "function"} | outer | {"function": function}


def to_tools(value: object, where: str) -> list[Any] | None:
    """The tools' JSON schemas, read from JSON if they are a text; None if there are none."""
    if value is None or value == "":
        return None
    tools = without_nulls(parsed(value, where, "tools"))
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise UserError(where, f"tools is {_kind(tools)}, expected a list of JSON schemas", "correct the row")
    return [parsed(tool, where, "tools") for tool in tools] or None


def legacy_tools(value: object) -> list[Any] | None:
    """OpenAI's `functions`, which came before `tools`, as tools; None if it is anything else."""
    if not isinstance(value, list) or not all(isinstance(each, dict) and "name" in each for each in value):
        return None
    return [{"type": "function", "function": without_nulls(each)} for each in value] or None


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
