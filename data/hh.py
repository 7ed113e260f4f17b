"""Dialogues written as one text, as in Anthropic's HH-RLHF (arXiv 2204.05862).

\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...\\n\\nAssistant: ...
"""

import re

from .fields import COMPLETION_NAMES, PROMPT_NAMES
from .rows import Message, RawRow, Unusable, text_message
from .spec import RowKind

_TURN = re.compile(r"\n\n(Human|Assistant):")
_BEGINNING = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}
ASSISTANT = "\n\nAssistant:"

DIFFERENT_PROMPTS = "the two sides differ before the last reply"


def is_dialogue(value: object) -> bool:
    """Whether it is a text that starts like an HH dialogue and contains an assistant turn."""
    return isinstance(value, str) and ASSISTANT in value and bool(_BEGINNING.match(value))


def parse_dialogue(text: str) -> list[Message]:
    """The turns as messages, their text stripped.

    A text that ends in `\\n\\nAssistant:` is a prompt: the empty last turn is left out.
    """
    # Some copies of the data have lost the leading blank line.
    text = "\n\n" + text.lstrip()
    parts = _TURN.split(text)[1:]
    if text.rstrip().endswith(ASSISTANT):
        parts = parts[:-2]
    messages: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == _ROLES[speaker]:
            # Twice the same speaker: one turn, since many chat templates insist on alternation.
            messages[-1]["content"] += "\n\n" + said.strip()
        else:
            messages.append(text_message(_ROLES[speaker], said.strip()))
    return messages


def split_pair(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """(prompt, chosen reply, rejected reply); the prompt ends at the LAST `\\n\\nAssistant:` of both.

    Raises:
        Unusable: the sides differ before it, so they are not two replies to one prompt.
    """
    prompt, _, reply = chosen.rpartition(ASSISTANT)
    other_prompt, _, other_reply = rejected.rpartition(ASSISTANT)
    if prompt.strip() != other_prompt.strip():
        raise Unusable(DIFFERENT_PROMPTS)
    return parse_dialogue(prompt + ASSISTANT), _own(reply), _own(other_reply)


def is_dialogue_pair(raw: RawRow, kind: RowKind) -> bool:
    """Whether both sides are whole dialogues, and rows of this kind are made from them."""
    if not (is_dialogue(raw.get("chosen")) and is_dialogue(raw.get("rejected"))):
        return False
    if kind == "label":
        return raw.get("label") is None
    if kind == "demo":
        return raw.get("label") is not False and all(raw.get(name) is None for name in COMPLETION_NAMES)
    return True


def dialogue_pair_as_ours(raw: RawRow, kind: RowKind, origin: str) -> RawRow:
    """The row with what the sides share as `prompt`, and only the last reply of each side left in it.

    Raises:
        Unusable: the sides are not two replies to one prompt.
    """
    prompt, chosen, rejected = split_pair(raw["chosen"], raw["rejected"])
    rest = {name: value for name, value in raw.items() if name not in (*PROMPT_NAMES, "chosen", "rejected")}
    if kind == "prompt":
        return rest | {"prompt": prompt}
    # as messages: a reply that looks like a dialogue is still one reply
    sides = {"chosen": [text_message("assistant", chosen)], "rejected": [text_message("assistant", rejected)]}
    return rest | {"prompt": prompt} | sides


def _own(reply: str) -> str:
    """A reply without any human turns after it."""
    return reply.partition("\n\nHuman:")[0].strip()
