"""Chatbot Arena's votes, in the shapes of their releases.

| fields | in |
|---|---|
| `model_a`, `model_b`, `winner`, `conversation_a`, `conversation_b` | 33k, 100k, 140k, MT-bench's human judgments |
| the same with `messages_a`, `messages_b` | search and vision arenas |
| `prompt`, `response_a`, `response_b`, `winner_model_a`, `winner_model_b`, `winner_tie` | 55k: texts that hold lists |
| `prompt`, `response_a`, `response_b`, `winner` | Kaggle's second contest: plain texts |
| `model_a`, `model_b`, `winner` alone | the older logs |

A content may be a text or a list of parts; a conversation may be a text that holds JSON or Python's own form.
"""

import ast
import json
from typing import Any

from ..errors import UserError
from .compared import ComparedFormat, Comparison, read_id, read_name, said_nothing, verdict
from .rows import Message, RawRow, text_message
from .spec import RowKind

_WINNERS = {
    **{"model_a": 0.0, "a": 0.0, "model_b": 1.0, "b": 1.0},
    **dict.fromkeys(("tie", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad"), 0.5),
    **dict.fromkeys(("tie (inconsistent)", "both_good", "bothgood", "neither"), 0.5),
}
_FLAGS = {"winner_model_a": 0.0, "winner_model_b": 1.0, "winner_tie": 0.5}
_CONVERSATIONS = (("conversation_a", "conversation_b"), ("messages_a", "messages_b"))
_RESPONSES = ("response_a", "response_b")
_IDS = ("question_id", "id", "uid", "conversation_id")


def is_arena(raw: RawRow, kind: RowKind | None) -> bool:
    """Whether the row has a winner and two sides, a and b."""
    del kind
    sides = (("model_a", "model_b"), *_CONVERSATIONS, _RESPONSES)
    voted = "winner" in raw or raw.keys() >= {"winner_model_a", "winner_model_b"}
    return voted and any(raw.keys() >= set(side) for side in sides)


def read_arena(raw: RawRow, origin: str) -> Comparison:
    """One vote.

    Raises:
        UserError: a winner or a conversation is not what it should be.
    """
    names = (read_name(raw, "model_a", origin), read_name(raw, "model_b", origin))
    talks = _conversations(raw, origin)
    asked = [turn["content"] for turn in talks[0] if turn["role"] == "user"] if talks is not None else []
    return Comparison(read_id(raw, _IDS, "\n\n".join(asked) or origin), names, _winner(raw, names, origin), talks)


def _winner(raw: RawRow, names: tuple[str | None, str | None], origin: str) -> float | None:
    if "winner" in raw:
        value = raw["winner"]
        # some exports write the winner's own name
        if isinstance(value, str) and names[0] != names[1] and value in names:
            return float(names.index(value))
        return verdict(value, _WINNERS, origin, "winner")
    given = {name: raw.get(name) for name in _FLAGS if not said_nothing(raw.get(name))}
    set_ = [name for name, value in given.items() if str(value).strip().lower() in ("1", "1.0", "true")]
    odd = next((name for name in given if str(given[name]).strip().lower() not in _BITS), None)
    if odd is not None or len(set_) > 1:
        said = f"{odd} is {given[odd]!r}" if odd is not None else f"{' and '.join(set_)} are both 1"
        raise UserError(origin, f"{said}, expected 1 for one of {', '.join(_FLAGS)} and 0 for the others", "correct it")
    return _FLAGS[set_[0]] if set_ else None


_BITS = ("0", "0.0", "1", "1.0", "true", "false")


def _conversations(raw: RawRow, origin: str) -> tuple[list[Message], list[Message]] | None:
    """Both conversations; None where they are not there, or hold something else than text."""
    for names in _CONVERSATIONS:
        if all(raw.get(name) is not None for name in names):
            first, second = (_talk(raw[name], raw.get("turn"), origin, name) for name in names)
            return None if first is None or second is None else (first, second)
    if raw.get("prompt") is None or any(raw.get(name) is None for name in _RESPONSES):
        return None
    if not all(isinstance(raw[name], str | list) for name in ("prompt", *_RESPONSES)):
        raise UserError(origin, "prompt and responses are no texts", "correct the row")
    columns = [_texts(raw[name]) for name in ("prompt", *_RESPONSES)]
    if any(column is None for column in columns):
        columns = [[raw[name]] for name in ("prompt", *_RESPONSES)]
    questions, *sides = columns
    if not all(isinstance(text, str) for column in columns for text in column or [None]):
        return None
    first, second = (_interleaved(questions or [], side or []) for side in sides)
    return first, second


def _talk(value: object, judged: object, origin: str, field: str) -> list[Message] | None:
    """The conversation up to the reply that was judged; None where it holds something else than text.

    Args:
        judged: how many replies were there when the vote was cast; MT-bench's rows go on after it.
    """
    turns = _unwrapped(value) if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise UserError(origin, f"{field} holds no list of messages", "write [{role: user, content: ...}, ...]")
    contents = [_content(turn.get("content")) for turn in turns]
    if any(content is None for content in contents):
        return None
    talk = [text_message(str(turn["role"]), str(said)) for turn, said in zip(turns, contents, strict=True)]
    replies = [place for place, turn in enumerate(talk) if turn["role"] == "assistant"]
    if isinstance(judged, bool) or not isinstance(judged, int) or not 1 <= judged <= len(replies):
        return talk
    return talk[: replies[judged - 1] + 1]


def _content(content: Any) -> str | None:
    """The text of a turn; None where it holds something else, such as an image."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    said = [text for text in texts if isinstance(text, str)]
    return "".join(said) if said and len(said) == len(texts) else None


def _texts(value: object) -> list[Any] | None:
    """The texts of a field that holds a list of them, as text perhaps; None: it is one plain text."""
    found = _unwrapped(value) if isinstance(value, str) else value
    return found if isinstance(found, list) and all(text is None or isinstance(text, str) for text in found) else None


def _unwrapped(text: str) -> Any:
    """What a text in JSON or in Python's own form holds; None where it is neither."""
    if not text.lstrip().startswith("["):
        return None
    try:
        return json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None


def _interleaved(questions: list[str], replies: list[str]) -> list[Message]:
    talk: list[Message] = []
    for question, reply in zip(questions, replies, strict=False):
        talk += [text_message("user", question), text_message("assistant", reply)]
    return talk


ARENA = ComparedFormat(
    "Chatbot Arena",
    is_arena,
    read_arena,
    frozenset(
        {"conversation_a", "conversation_b", "messages_a", "messages_b", "prompt", *_RESPONSES, "full_conversation"}
    ),
)
