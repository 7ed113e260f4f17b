"""A chat template in Go's template language, as Ollama takes it, made from what the model's own template renders.

A Jinja template is a program, so it is not translated but asked: conversations of marks show what stands before and
behind a message of each role, at the front, and where a reply begins. What was made is then held against the model's
own on other conversations. A template that is no such sequence (it looks at other messages, counts, merges the
system's into the user's) is refused.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import UserError
from .messages import Message

Render = Callable[[list[Message], bool], str]
"""(messages, whether a reply is to begin) -> text; raises UserError or ValueError on messages that it refuses."""

_REMEDY = "export it with --to gguf, which keeps the model's own template, and write Ollama's TEMPLATE by hand"
_WHERE = "chat template"
_TEXTS = ("How are you?", 'Two\n\nlines, {{ x }} and "quotes"', "é 日本 <b>", "a", "5 + 6 = `11` \\n")


@dataclass(frozen=True)
class GoTemplate:
    """What a conversation is made of.

    Attributes:
        unled: before everything where the first message is none of the system's.
        around: of each role, what stands before and behind a message's content; without `system` where the model's own
            template refuses one.
        reply: what a reply begins with.
        trims: whether the model's own takes white space off a message's ends, which Ollama's does not.
    """

    unled: str
    around: dict[str, tuple[str, str]]
    reply: str
    trims: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """What `text()` gives in Ollama of a conversation to which a reply is to come."""
        led = messages[0]["role"] == "system"
        said = [self.around[each["role"]][0] + each["content"] + self.around[each["role"]][1] for each in messages]
        return ("" if led else self.unled) + "".join(said) + self.reply

    def text(self) -> str:
        """In Go's language. A last message of the assistant's is a reply that has begun, which goes on."""
        branches = []
        for role, (before, behind) in self.around.items():
            end = f"{{{{- if not $last }}}}{_go(behind)}{{{{- end }}}}" if role == "assistant" else _go(behind)
            word = "else if" if branches else "if"
            branches.append(f'{{{{- {word} eq .Role "{role}" }}}}{_go(before)}{{{{- .Content }}}}{end}')
        unled = (
            f'{{{{- if ne (index .Messages 0).Role "system" }}}}{_go(self.unled)}{{{{- end }}}}' if self.unled else ""
        )
        return (
            f"{unled}"
            "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}"
            f"{''.join(branches)}{{{{- end }}}}"
            f'{{{{- if and $last (ne .Role "assistant") }}}}{_go(self.reply)}{{{{- end }}}}'
            "{{- end }}"
        )


def go_template(render: Render) -> GoTemplate:
    """Ollama's template for the model whose own template is `render`.

    Raises:
        UserError: it is no sequence of messages with something around each.
    """
    try:
        made = _taken_apart(render)
    except (UserError, ValueError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(_WHERE, f"cannot be written for Ollama: {said}", _REMEDY) from error
    for messages in _conversations("system" in made.around):
        try:
            wanted = render(messages, True)
        except (UserError, ValueError) as error:
            said = f"refuses a conversation of {_roles(messages)}, and Ollama has no way to refuse one"
            raise UserError(_WHERE, said, _REMEDY) from error
        if made.render(messages) != wanted:
            said = f"writes a conversation of {_roles(messages)} otherwise than message by message"
            raise UserError(_WHERE, said, _REMEDY)
    return made


def _taken_apart(render: Render) -> GoTemplate:
    """From conversations of marks. Raises ValueError where it does not come apart."""
    user, reply, again = (_mark(role, place) for place, role in enumerate(("user", "assistant", "user")))
    alone, opened = render([user], False), render([user], True)
    if not opened.startswith(alone):
        raise ValueError("a reply does not begin behind the last message")
    behind_user = _cut(alone, user)[1]
    behind_reply = _cut(render([user, reply], False), user, reply)[2]
    start, answered, asked, _ = _cut(render([user, reply, again], False), user, reply, again)
    before_reply = _without(answered, behind_user, "user's")
    before_user = _without(asked, behind_reply, "assistant's")
    if not start.endswith(before_user):
        raise ValueError("the first message stands otherwise than the next")
    around = {"user": (before_user, behind_user), "assistant": (before_reply, behind_reply)}
    made = GoTemplate(start.removesuffix(before_user), around, opened[len(alone) :])
    spaced = render([Message(role="user", content="  x  ")], True)
    return replace(_with_system(render, made), trims="  x  " not in spaced)


def _with_system(render: Render, made: GoTemplate) -> GoTemplate:
    """The same with the system's messages, where the model's own template takes one."""
    system, user = _mark("system", 3), _mark("user", 0)
    try:
        text = render([system, user], False)
    except (UserError, ValueError):
        return made
    before, between, _ = _cut(text, system, user)
    before_user = made.around["user"][0]
    if not between.endswith(before_user):
        raise ValueError("a system message stands within the user's")
    return replace(made, around={"system": (before, between.removesuffix(before_user)), **made.around})


def _mark(role: str, place: int) -> Message:
    return Message(role=role, content=f"mark{place}of{role}")


def _cut(text: str, *marks: Message) -> list[str]:
    """What stands before, between and behind the marks."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark["content"])
        if not found:
            raise ValueError(f"a message of the {mark['role']}'s is not in it")
        parts.append(before)
    return [*parts, text]


def _without(text: str, before: str, whose: str) -> str:
    if not text.startswith(before):
        raise ValueError(f"what stands behind a message of the {whose} depends on what follows")
    return text.removeprefix(before)


def _conversations(system: bool) -> Iterator[list[Message]]:
    """Ones that the template was not made from, to each of which a reply is to come."""
    for turns in (1, 2, 3):
        for led in (False, True) if system else (False,):
            roles = ["system"] * led + ["user", "assistant"] * (turns - 1) + ["user"]
            yield [
                Message(role=role, content=_TEXTS[(place + turns) % len(_TEXTS)]) for place, role in enumerate(roles)
            ]


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(each["role"] for each in messages)


def _go(text: str) -> str:
    """A text as an action of its own, so that no white space of it is taken away and nothing in it is read as one."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
