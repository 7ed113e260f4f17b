"""Splitting conversations into prompt and reply, and what makes a row unusable."""

from .rows import Message, Row, Unusable

SEVERAL_TURNS = "the sides differ in more than one turn"
NO_REPLY = "no assistant's turn"
EMPTY_PROMPT = "empty prompt"
EMPTY_REPLY = "empty reply"
SAME_SIDES = "chosen and rejected are the same"
UNWANTED = "labelled as unwanted"


def first_turn(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, rest): split before the first assistant turn; messages after the last one are left out."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            return messages[:i], until_reply(messages[i:])
    raise Unusable(NO_REPLY)


def last_turn(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, reply): split before the last assistant turn; messages after it are left out."""
    messages = until_reply(messages)
    return messages[:-1], messages[-1:]


def until_reply(messages: list[Message]) -> list[Message]:
    """The messages up to and including the last assistant turn.

    Raises:
        Unusable: there is none.
    """
    if messages and messages[-1]["role"] == "assistant":
        return messages
    end = next((i for i in range(len(messages), 0, -1) if messages[i - 1]["role"] == "assistant"), 0)
    if end == 0:
        raise Unusable(NO_REPLY)
    return messages[:end]


def single(side: list[Message]) -> list[Message]:
    """The side of a pair, which must be one assistant turn.

    Raises:
        Unusable: it is more than one.
    """
    side = until_reply(side)
    if len(side) != 1:
        raise Unusable(SEVERAL_TURNS)
    return side


def has_system(messages: list[Message]) -> bool:
    """Whether the conversation begins with a system (or developer) message."""
    return bool(messages) and messages[0]["role"] in ("system", "developer")


def check(row: Row) -> None:
    """Raise Unusable if no stage can learn from the row."""
    if not row.prompt or not any(_says(message) for message in row.prompt):
        raise Unusable(EMPTY_PROMPT)
    for side in (row.completion, row.chosen, row.rejected):
        for message in side or ():
            if message["role"] == "assistant" and not _says(message):
                raise Unusable(EMPTY_REPLY)
    if row.chosen is not None and row.chosen == row.rejected:
        raise Unusable(SAME_SIDES)


def _says(message: Message) -> bool:
    return bool(message["content"].strip()) or bool(message.get("tool_calls"))
