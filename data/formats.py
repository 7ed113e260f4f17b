"""Recognise a raw row's format and normalise it.

A foreign format is one record of `FORMATS`, which rewrites a row in our own fields:

| format | fields |
|---|---|
| votes | `policy_a`, `policy_b`, `completion_a`, `completion_b`, `preference` (1 to 2), `prompt` as messages |
| comparisons | AlpacaEval's annotations, Chatbot Arena's votes, ... (`comparisons.py`) |
| HH-RLHF | `chosen`, `rejected` as text with `Human:` and `Assistant:` turns |
| Alpaca | `instruction`, `input`, `output`, `system`, `history` |
| OpenAI preferences | `input` with `messages` and `tools`, `preferred_output`, `non_preferred_output` |

Our own fields, from which `_Reader` makes the kind of rows that is asked for:

| rows | fields |
|---|---|
| prompt and completion | `prompt`, `completion` (or one of the other names in `fields.py`), text or messages |
| preference | `chosen`, `rejected`, with `prompt` or as whole conversations that share their beginning |
| conversation | `messages`, or ShareGPT's `conversations` (`from`, `value`), with `system` and `tools` beside them |
| unpaired | any of the above with one completion, and `label` |
| prompt only | `prompt`, or a conversation (its last reply is left out) |

How one text or one list of messages may be written (plain, HH, ShareGPT) is settled in `messages.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, closest
from .alpaca import alpaca_as_ours, is_alpaca
from .comparisons import COMPARED
from .fields import COMPLETION_NAMES, CONVERSATION_NAMES, PROMPT_NAMES, SYSTEM_NAMES
from .hh import dialogue_pair_as_ours, is_dialogue_pair
from .messages import legacy_tools, to_messages, to_tools
from .rows import Message, RawRow, Row, Unusable, text_message
from .spec import OUR_COLUMNS, RowKind
from .turns import SAME_SIDES, UNWANTED, check, first_turn, has_system, last_turn, single, until_reply
from .voted import is_vote, vote_as_ours
from .wrapped import is_wrapped, wrapped_as_ours


@dataclass(frozen=True)
class Format:
    """A foreign format. To add one, write its two functions in a file of its own and its record in `FORMATS`.

    Which kinds of rows it gives follows from the fields that it is rewritten in: `prompt` and `completion` give
    demonstrations and prompts; `prompt`, `chosen` and `rejected` give all four kinds.

    Attributes:
        recognises: (raw row, kind) -> whether the row is of this format, and its fields make rows of that kind.
        as_ours: (raw row, kind, origin) -> the row in our fields; other fields are kept. Raises UserError if a field
            holds something wrong, Unusable if the row cannot be used.
    """

    name: str
    recognises: Callable[[RawRow, RowKind], bool]
    as_ours: Callable[[RawRow, RowKind, str], RawRow]


FORMATS = (
    Format("votes", is_vote, vote_as_ours),
    *(Format(each.name, each.recognises, each.as_ours) for each in COMPARED),
    Format("HH-RLHF", is_dialogue_pair, dialogue_pair_as_ours),
    Format("OpenAI preferences", is_wrapped, wrapped_as_ours),
    Format("Alpaca", is_alpaca, alpaca_as_ours),
)
"""The first that recognises a row rewrites it; a row that none recognises is read as it is."""
_OUR_FIELDS = frozenset(OUR_COLUMNS)
_WITHIN_OURS = tuple(each for each in FORMATS if each.name in ("HH-RLHF", "OpenAI preferences"))
"""Those that a row without foreign fields may have: all others are known by a field's name."""

_EXPECTED: dict[RowKind, str] = {
    "demo": "prompt and completion, or messages, conversations, or instruction and output",
    "pair": "chosen and rejected, with prompt or as whole conversations",
    "label": "label with prompt and completion or with messages (or chosen and rejected)",
    "prompt": "prompt, messages, conversations, or instruction",
}


def normalise(raw: RawRow, kind: RowKind, origin: str, columns: dict[str, str] | None = None) -> list[Row]:
    """The rows of `kind` that `raw` stands for: one, or two where a pair serves as labelled completions.

    Args:
        origin: where the row comes from, for error messages.
        columns: maps our field names to the row's, for those that are not recognised.

    Raises:
        UserError: a field is missing or holds something else.
        Unusable: the row is valid but cannot be used (two equal sides, an empty reply, ...).
    """
    raw = _renamed(raw, columns, origin)
    candidates = _WITHIN_OURS if raw.keys() <= _OUR_FIELDS else FORMATS
    format = next((each for each in candidates if each.recognises(raw, kind)), None)
    return _Reader(raw if format is None else format.as_ours(raw, kind, origin), kind, origin).rows()


def _renamed(raw: RawRow, columns: dict[str, str] | None, origin: str) -> RawRow:
    if not columns:
        return raw
    for ours, theirs in columns.items():
        if theirs not in raw:
            near = closest(theirs, raw, cutoff=0.6)
            hint = f"did you mean {near!r}?" if near else "correct `columns`"
            raise UserError(origin, f"no field {theirs!r} for {ours} (found {', '.join(raw)})", hint)
    taken = set(columns.values())
    return {k: v for k, v in raw.items() if k not in taken} | {ours: raw[theirs] for ours, theirs in columns.items()}


class _Reader:
    """Makes rows from one raw row in our fields; fields that nothing has used become `columns`."""

    def __init__(self, raw: RawRow, kind: RowKind, origin: str) -> None:
        self.raw, self.origin = raw, origin
        self.kind: RowKind = kind
        self.fields = [name for name, value in raw.items() if value is not None]
        self.taken = {"tools"}
        self.system = self.system_text()

    def rows(self) -> list[Row]:
        readers: dict[RowKind, Callable[[], list[Row]]] = {
            "demo": self.demo,
            "pair": self.pair,
            "label": self.labelled,
            "prompt": self.prompt_only,
        }
        rows = readers[self.kind]()
        for row in rows:
            check(row)
        return rows

    # -- the four kinds ------------------------------------------------------------------------------------------

    def demo(self) -> list[Row]:
        if self.raw.get("label") is False:
            # Labelled completions: nobody wants the unwanted ones as demonstrations.
            raise Unusable(UNWANTED)
        if "chosen" in self.fields and not self.name_of(COMPLETION_NAMES):
            prompt, completion = self.one_side("chosen")
        else:
            prompt, completion = self.demonstration()
        return [self.row(prompt, completion=completion)]

    def pair(self) -> list[Row]:
        prompt, chosen, rejected = self.sides()
        margin = self.raw.get("margin")
        if margin is not None:
            margin = self.margin(margin)
            self.taken.add("margin")
        return [self.row(prompt, chosen=chosen, rejected=rejected, margin=margin)]

    def labelled(self) -> list[Row]:
        if "label" not in self.fields and {"chosen", "rejected"} <= set(self.fields):
            prompt, chosen, rejected = self.sides()
            if chosen == rejected:
                raise Unusable(SAME_SIDES)
            return [
                self.row(prompt, completion=chosen, label=True),
                self.row(prompt, completion=rejected, label=False),
            ]
        label = self.label()
        prompt, completion = self.demonstration()
        prompt, completion = last_turn(prompt + completion)
        return [self.row(prompt, completion=completion, label=label)]

    def prompt_only(self) -> list[Row]:
        pairs = {"chosen", "rejected"} <= set(self.fields)
        name = self.name_of(PROMPT_NAMES)
        if pairs and (name is None or self.whole_conversations()):
            return [self.row(self.sides()[0])]
        if name is not None:
            return [self.row(self.with_system(self.value(name, "user")))]
        name = self.name_of(CONVERSATION_NAMES)
        if name is None:
            raise self.missing()
        messages = self.with_system(self.value(name, "user"))
        ends_in_reply = bool(messages) and messages[-1]["role"] == "assistant"
        return [self.row(last_turn(messages)[0] if ends_in_reply else messages)]

    # -- their parts ---------------------------------------------------------------------------------------------

    def demonstration(self) -> tuple[list[Message], list[Message]]:
        """(prompt, completion) of a row with one completion."""
        reply = self.name_of(COMPLETION_NAMES)
        name = self.name_of(PROMPT_NAMES) if reply is not None else None
        if reply is not None and name is not None:
            prompt = self.value(name, "user")
            completion = self.value(reply, "assistant")
            if completion and completion[0]["role"] != "assistant":
                # The whole conversation stands in the completion.
                return first_turn(self.with_system(completion))
            return self.with_system(prompt), until_reply(completion)
        talk = self.name_of(CONVERSATION_NAMES)
        if talk is None:
            raise self.missing()
        return first_turn(self.with_system(self.value(talk, "user")))

    def sides(self) -> tuple[list[Message], list[Message], list[Message]]:
        """(prompt, chosen, rejected): each side one assistant message."""
        if not {"chosen", "rejected"} <= set(self.fields):
            raise self.missing()
        good, bad = self.value("chosen", "assistant"), self.value("rejected", "assistant")
        prompt = self.context()
        shared = 0
        # Up to the last reply: two equal sides still have one.
        while shared < min(len(good), len(bad)) - 1 and good[shared] == bad[shared]:
            shared += 1
        if _is_whole(good):
            prompt = self.with_system(good[:shared])
        elif prompt is None:
            raise self.missing()
        else:
            prompt = prompt + good[:shared]
        return prompt, single(good[shared:]), single(bad[shared:])

    def one_side(self, name: str) -> tuple[list[Message], list[Message]]:
        """(prompt, completion) from one side of a pair; only its last reply is the side's own."""
        if "rejected" in self.fields:
            prompt, chosen, _ = self.sides()
            return prompt, chosen
        side = self.value(name, "assistant")
        if side and side[0]["role"] != "assistant":
            return last_turn(self.with_system(side))
        prompt = self.context()
        if prompt is None:
            raise self.missing()
        return prompt, single(side)

    def whole_conversations(self) -> bool:
        """Whether the sides contain their prompt."""
        side = self.raw.get("chosen")
        return _is_whole(to_messages(side, "assistant", self.origin, "chosen"))

    def context(self) -> list[Message] | None:
        """What comes before the sides, from a prompt or a conversation; None if there is neither."""
        name = self.name_of(PROMPT_NAMES)
        if name is not None:
            return self.with_system(self.value(name, "user"))
        name = self.name_of(CONVERSATION_NAMES)
        return None if name is None else self.with_system(self.value(name, "user"))

    def with_system(self, messages: list[Message]) -> list[Message]:
        if self.system is None or has_system(messages):
            return messages
        return [text_message("system", self.system), *messages]

    def system_text(self) -> str | None:
        name = next((name for name in SYSTEM_NAMES if isinstance(self.raw.get(name), str)), None)
        if name is None:
            return None
        self.taken.add(name)
        return self.raw[name] if self.raw[name].strip() else None

    def label(self) -> bool:
        if "label" not in self.fields:
            raise self.missing()
        self.taken.add("label")
        value = self.raw["label"]
        word = str(value).strip().lower()
        if word in ("true", "1", "1.0"):
            return True
        if word in ("false", "0", "0.0"):
            return False
        raise UserError(self.origin, f"label is {value!r}, expected true or false", "correct the row")

    def margin(self, value: object) -> float:
        try:
            margin = float(value) if isinstance(value, int | float | str) else math.nan
        except ValueError:
            margin = math.nan
        if not math.isfinite(margin):
            raise UserError(
                self.origin, f"margin is {value!r}, expected a finite number", "correct the row, or leave margin out"
            )
        return margin

    # -- fields --------------------------------------------------------------------------------------------------

    def value(self, name: str, role: str) -> list[Message]:
        self.taken.add(name)
        return to_messages(self.raw[name], role, self.origin, name)

    def name_of(self, names: tuple[str, ...]) -> str | None:
        """The field of `names` that the row has; the first name is ours and takes precedence.

        Raises:
            UserError: it has several of the others.
        """
        found = [name for name in names if name in self.fields]
        if not found or found[0] == names[0]:
            return found[0] if found else None
        if len(found) > 1:
            raise UserError(
                self.origin,
                f"{' and '.join(found)} could each be the {names[0]}",
                f"say which in `columns`, as columns: {{{names[0]}: {found[0]}}}",
            )
        return found[0]

    def missing(self) -> UserError:
        ours = {"demo": ("completion", "prompt"), "pair": ("chosen", "rejected", "prompt"), "label": ("label",)}
        wanted = [name for name in ours.get(self.kind, ("prompt",)) if name not in self.fields]
        hint = "rename the fields or map them with `columns`"
        for name in wanted:
            if near := closest(name, self.fields, cutoff=0.75):
                hint = f"map it with columns: {{{name}: {near}}}"
                break
        lacking = f"no {wanted[0]}: " if wanted else ""
        found = ", ".join(self.fields) or "nothing"
        return UserError(self.origin, f"{lacking}found {found}; expected {_EXPECTED[self.kind]}", hint)

    def row(self, prompt: list[Message], **parts: Any) -> Row:
        rest = {name: value for name, value in self.raw.items() if name not in self.taken}
        tools = to_tools(self.raw.get("tools"), self.origin)
        if tools is None and (functions := legacy_tools(self.raw.get("functions"))):
            tools = functions
            rest.pop("functions", None)
        return Row(prompt=prompt, tools=tools, columns=rest, origin=self.origin, **parts)


def _is_whole(side: list[Message]) -> bool:
    """Whether a side holds its prompt as well."""
    return bool(side) and side[0]["role"] != "assistant"
