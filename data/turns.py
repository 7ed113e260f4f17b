"""Cutting conversations into prompt and reply, and what makes a row unusable."""

from .rows import Message, Row, Unusable

SEVERAL_TURNS = "the sides differ in more than one turn"
NO_REPLY = "no assistant's turn"
EMPTY_PROMPT = "empty prompt"
EMPTY_REPLY = "empty reply"
SAME_SIDES = "chosen and rejected are the same"
UNWANTED = "labelled as unwanted"


def first_turn(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split before the first assistant's turn; what follows the last one is cut."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            return messages[:i], until_reply(messages[i:])
    raise Unusable(NO_REPLY)


def last_turn(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split before the last assistant's turn; what follows it is cut."""
    messages = until_reply(messages)
    return messages[:-1], messages[-1:]


def until_reply(messages: list[Message]) -> list[Message]:
    end = next((i for i in range(len(messages), 0, -1) if messages[i - 1]["role"] == "assistant"), 0)
    if end == 0:
        raise Unusable(NO_REPLY)
    return messages[:end]


def single(side: list[Message]) -> list[Message]:
    side = until_reply(side)
    if len(side) != 1:
        raise Unusable(SEVERAL_TURNS)
    return side


def has_system(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] in ("system", "developer")


def check(row: Row) -> None:
    """Raises Unusable for what no stage can learn from."""
    if not row.prompt or not any(_says(message) for message in row.prompt):
        raise Unusable(EMPTY_PROMPT)
    for side in (row.completion, row.chosen, row.rejected):
        if side is not None and not all(_says(m) for m in side if m["role"] == "assistant"):
            raise Unusable(EMPTY_REPLY)
    if row.chosen is not None and row.chosen == row.rejected:
        raise Unusable(SAME_SIDES)


def _says(message: Message) -> bool:
    return bool(message.get("tool_calls")) or bool(message["content"].strip())
