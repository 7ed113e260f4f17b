"""Where in a templated conversation the replies are.

A conversation is laid out as text first: for each reply, where the prompt that it would be sampled after ends, and
where its own end is. Most templates write a conversation's beginning as they write it alone, so that the replies lie
between beginnings. Some write a turn differently once others follow (Qwen3 and gpt-oss leave out reasoning): there the
turn is found in the whole, by a mark in the message before it. What a template would leave out of a reply is put back
where the reply's place is plain, or refused.

Then the text becomes ids. A boundary is found in the ids of the whole, except where a token would reach over it: the
prompt that a reply is sampled after is a text of its own, so there the reply's ids begin where that prompt's end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .messages import TRAINS
from .rows import Message
from .template import MARK, REASONING, SPEAKERS, Templater, common_prefix, marked, shows, shows_call, snippet

BOUNDARY_MOVED = "prompt boundary moved"
LAST_TURN_ONLY = "turns not told apart, only the last one trains"
EMPTY_REASONING = "an empty reasoning block closes the one that the prompt opens"

_PART_OF_TAG = re.compile(r"<[^<>]*$")
_OPENED = re.compile(r"<think>\n?$")
_EMPTY_BLOCK = re.compile(r"<think>\s*</think>\s*$")
_EMPTY_BEFORE_ANOTHER = re.compile(r"^(?:<think>)?\s*</think>\s*(?=<think>)")


@dataclass(frozen=True)
class Layout:
    """A templated conversation as text.

    text: the whole conversation.
    replies: [start, end) in the text of each reply that was found; the last one always is.
    trains: for each of them, whether the row wants it trained on.
    remarks: what is worth counting about it.
    before: the prompt's text, with the generation prompt.
    plain: one reply, filled into a template that only writes what is said, without a special token in what is said.
    """

    text: str
    replies: list[tuple[int, int]]
    trains: list[bool]
    remarks: tuple[str, ...] = ()
    before: str = ""
    plain: bool = False

    def texts(self) -> list[str]:
        """The texts whose ids `find_spans` compares: the whole, and what comes before each boundary."""
        return [
            self.text,
            *(self.text[:start] for start, _ in self.replies),
            *(self.text[:end] for _, end in self.replies[:-1]),
        ]


@dataclass(frozen=True)
class Spans:
    """A templated conversation's ids and the parts of it that an assistant wrote.

    ids: the conversation up to the EOS of its last reply.
    prompt: number of ids before the first reply.
    trained: [start, end) of each reply to train on, its EOS included.
    moved: a token of the whole conversation reaches over a reply's beginning, and the tokenizer cannot begin there; the
        boundary is where the ids first differ.
    """

    ids: list[int]
    prompt: int
    trained: list[tuple[int, int]]
    moved: bool = False


def lay_out(
    templater: Templater,
    prompt: list[Message],
    completion: list[Message],
    tools: list[Any] | None,
    where: str,
    before: str | None = None,
) -> Layout:
    """The conversation as text, with the places of the completion's replies.

    A prompt that ends in an assistant's turn is a reply that has begun: the completion's first turn goes on with it.

    Args:
        before: the prompt's text with the generation prompt, if another layout of the same prompt has it.

    Raises:
        UserError: the template refuses the conversation, or leaves something out that the row says.
    """
    if (filled := _filled(templater, prompt, completion, tools, before)) is not None:
        return filled
    begun = prompt[-1] if prompt and prompt[-1]["role"] == "assistant" else None
    if begun is not None and completion[0]["role"] == "assistant" and not begun.get("tool_calls"):
        first = completion[0]
        completion = [first | {"content": begun["content"] + first["content"]}, *completion[1:]]
        prompt = prompt[:-1]
    else:
        begun = None
    return _Search(templater, prompt, completion, tools, where, begun, before).layout()


def _filled(
    templater: Templater, prompt: list[Message], completion: list[Message], tools: list[Any] | None, before: str | None
) -> Layout | None:
    """The layout of one reply by filling in the template's blanks; None where there is more to look at."""
    if len(completion) != 1 or not prompt or prompt[-1]["role"] == "assistant":
        return None
    if not all(message["role"] in SPEAKERS for message in prompt):
        return None
    whole = templater.filled([*prompt, *completion], tools, False)
    if whole is None:
        return None
    before = before or templater.filled(prompt, tools, True)
    # a template may write more behind a prompt than in the whole, or reasoning: the search looks at those
    if before is None or not whole.startswith(before) or "think>" in whole or "think>" in before:
        return None
    reply = completion[0]["content"].strip()
    if reply not in whole[len(before) :]:
        return None
    pieces = templater.pieces
    plain = (
        pieces is not None
        and pieces.covers(whole)
        and not any(pieces.special.search(each["content"]) for each in (*prompt, *completion))
    )
    return Layout(whole, [(len(before), len(whole))], [True], (), before, plain)


class _Search:
    """The search for the replies in one conversation."""

    def __init__(
        self,
        templater: Templater,
        prompt: list[Message],
        completion: list[Message],
        tools: list[Any] | None,
        where: str,
        begun: Message | None,
        before: str | None,
    ) -> None:
        self.templater, self.tools, self.where, self.begun = templater, tools, where, begun
        self.messages, self.whole = templater.fitted(prompt + completion, tools, False, where)
        self.said = prompt + completion
        self.first = len(prompt)
        self.remarks: list[str] = []
        self._befores: dict[int, str] = {} if before is None else {self.first: before}

    def layout(self) -> Layout:
        numbers = [i for i in range(self.first, len(self.said)) if self.said[i]["role"] == "assistant"]
        found = [(i, self.start(i), self.end(i)) for i in numbers]
        places = [(i, start, end) for i, start, end in found if start is not None and end is not None and start < end]
        for i in {i for i, *_ in found} - {i for i, *_ in places}:
            if (lost := self.lost(i, self.whole)) is not None:
                raise self.templater.lost(self.where, lost)
        if len(places) < len(found):
            self.remarks.append(LAST_TURN_ONLY)
            places = places[-1:] if places and places[-1][0] == numbers[-1] else [self.last_resort(numbers[-1])]
        text, replies, trains, done = "", [], [], 0
        for i, start, end in places:
            opening, reply = self.reply(i, start, end)
            text += self.whole[done:start] + opening
            replies.append((len(text), len(text) + len(reply)))
            trains.append(self.said[i].get(TRAINS) is not False)
            text, done = text + reply, end
        before = self._befores.get(self.first, "")
        return Layout(text + self.whole[done:], replies, trains, tuple(self.remarks), before)

    # -- the places of a reply -----------------------------------------------------------------------------------

    def start(self, number: int) -> int | None:
        """Where the prompt ends that this reply is sampled after, in the whole."""
        before = self.before(number)
        if self.whole.startswith(before):
            return len(before)
        if number == 0 or (number == self.first and self.begun is not None):
            return None
        # The turns before are written differently here: from the end of the message before the reply, the whole and the
        # prompt go together as far as the prompt's header.
        alone = self.tail(marked(self.messages[:number], number - 1, after=MARK), generation_prompt=True)
        inside = self.tail(marked(self.messages, number - 1, after=MARK))
        if alone is None or inside is None or not self.whole.endswith(inside):
            return None
        shared = len(_shared(alone, inside))
        if shared < len(alone):
            # They part where the reply begins, not within a tag that only begins alike (<think>, <tool_call>).
            part = _PART_OF_TAG.search(alone[:shared]) or _OPENED.search(alone)
            shared = min(shared, part.start()) if part is not None else shared
        return len(self.whole) - len(inside) + shared

    def before(self, number: int) -> str:
        """The prompt of this reply as it stands alone, with the generation prompt."""
        if number not in self._befores:
            messages = self.messages[:number]
            if self.begun is not None and number == self.first:
                messages = [*messages, self.begun]
            self._befores[number] = self.templater.text(messages, self.tools, True, self.where)
        return self._befores[number]

    def end(self, number: int) -> int | None:
        """Where this reply's turn ends, in the whole; None if that cannot be told."""
        if number == len(self.messages) - 1:
            return len(self.whole)
        alone = self.templater.text(self.messages[: number + 1], self.tools, False, self.where)
        if self.whole.startswith(alone):
            return len(alone)
        after = self.tail(marked(self.messages, number + 1, before=MARK))
        start = self.start(number)
        if after is None or start is None or not self.whole.endswith(after):
            return None
        stop = len(self.whole) - len(after)
        eos = str(self.templater.tokenizer.eos_token)
        if (last := self.whole.rfind(eos, start, stop)) >= 0:
            return last + len(eos)
        content = (self.messages[number]["content"] or "").rpartition("</think>")[2].strip()
        if not content or (last := self.whole.rfind(content, start, stop)) < 0:
            return None
        last += len(content)
        # An end token of another name than the last turn's (gpt-oss writes <|end|> here and <|return|> there); a
        # template that writes none at all goes on with the next speaker's, which is not the reply's.
        ends = bool(self.end_token(alone.rpartition(content)[2]))
        return last + (len(self.end_token(self.whole[last:stop])) if ends else 0)

    def end_token(self, rest: str) -> str:
        """The added token that `rest` begins with, or nothing."""
        tokens = sorted((str(token) for token in self.templater.tokenizer.added_tokens_decoder.values()), key=len)
        return next((token for token in reversed(tokens) if token and rest.startswith(token)), "")

    def tail(self, messages: list[Message], generation_prompt: bool = False) -> str | None:
        """What is written after the mark, if the mark is written."""
        text = self.templater.text(messages, self.tools, generation_prompt, self.where)
        return text.rpartition(MARK)[2] if MARK in text else None

    def last_resort(self, number: int) -> tuple[int, int, int]:
        """The last reply, from where the whole first differs from its prompt."""
        return number, len(_shared(self.before(number), self.whole)), len(self.whole)

    # -- the text of a reply -------------------------------------------------------------------------------------

    def reply(self, number: int, start: int, end: int) -> tuple[str, str]:
        """(what the prompt ends in beyond the whole, the reply's text), with all that the row says in it."""
        text = self.whole[start:end]
        if self.lost(number, self.whole[:start][-len(MARK) :] + text) is not None:
            text = self.restored(number, start, end)
        # A template that reads reasoning from its own field alone writes an empty block before the row's.
        text = _EMPTY_BEFORE_ANOTHER.sub("", text)
        # A reply follows the prompt that it is sampled after, an opened block of reasoning included.
        opened = _OPENED.search(self.before(number))
        last = number == len(self.messages) - 1
        if opened is None:
            return "", text
        if _OPENED.search(self.whole[:start]):
            return "", text.removeprefix("<think>").removeprefix("\n") if text.startswith("<think>") else text
        if text.startswith("<think>"):
            return opened.group(), text.removeprefix("<think>").removeprefix("\n")
        if not last:
            return "", text
        if "</think>" not in text:
            self.remarks.append(EMPTY_REASONING)
            text = "\n</think>\n\n" + text
        return opened.group(), text

    def lost(self, number: int, text: str) -> str | None:
        """What of this message is not in the text, in words."""
        message = self.said[number]
        for name in REASONING:
            if isinstance(message.get(name), str) and not shows(text, message[name]):
                return f"the {name} of an assistant's turn: {snippet(message[name])}"
        content = message["content"]
        if self.begun is not None and number == self.first:
            content = content.removeprefix(self.begun["content"])
        # an empty block of reasoning says nothing
        content = re.sub(r"^\s*<think>\s*</think>", "", content)
        pieces = re.split(r"</?think>", content) if "think>" in content else [content]
        for piece in pieces:
            if not shows(text, piece):
                return f"a part of an assistant's turn: {snippet(piece)}"
        for call in message.get("tool_calls") or ():
            if not shows_call(text, call):
                return f"the call of {call['function']['name']!r}"
        return None

    def restored(self, number: int, start: int, end: int) -> str:
        """The reply as the template would write it if it left nothing of its text out.

        Raises:
            UserError: there is no place for what is left out.
        """
        message = self.said[number]
        lost = self.lost(number, self.whole[start:end]) or ""
        reasoning = next((message[name] for name in REASONING if isinstance(message.get(name), str)), None)
        content = message["content"]
        if reasoning is not None and "</think>" not in content:
            if "</think>" not in str(self.templater.tokenizer.chat_template):
                raise self.templater.lost(self.where, lost)
            content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content.lstrip()}"
        bare = {name: value for name, value in self.messages[number].items() if name not in REASONING}
        messages = [*self.messages[:number], bare | {"content": MARK}, *self.messages[number + 1 :]]
        text = self.templater.text(messages, self.tools, False, self.where)
        head, rest = self.whole[:start], self.whole[end:]
        if not (text.startswith(head) and text.endswith(rest)) or MARK not in text:
            raise self.templater.lost(self.where, lost)
        before, _, after = text[len(head) : len(text) - len(rest)].partition(MARK)
        if "</think>" in content:
            before = _EMPTY_BLOCK.sub("", before)
        reply = before + content.strip() + after
        if (still := self.lost(number, reply)) is not None:
            raise self.templater.lost(self.where, still)
        return reply


def _shared(a: str, b: str) -> str:
    """The longest beginning of both."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return a[:n]
    return a[: next(i for i in range(n) if a[i] != b[i])]


def find_spans(templater: Templater, layout: Layout, ids: Sequence[list[int]]) -> Spans:
    """The conversation's ids and where the replies are in them.

    Args:
        ids: of the texts that `layout.texts()` returns, in its order.
    """
    count = len(layout.replies)
    whole, befores, untils = ids[0], list(ids[1 : count + 1]), list(ids[count + 1 :])
    starts = [common_prefix(before, whole) for before in befores]
    moved = any(start < len(before) for start, before in zip(starts, befores, strict=True))
    ends = [common_prefix(until, whole) for until in untils] + [len(whole)]
    if moved and (joined := _joined(templater, layout, befores[0], whole)) is not None:
        whole, bounds = joined
        starts, ends, moved = [start for start, _ in bounds], [end for _, end in bounds], False
    turns = []
    for start, end in zip(starts, ends, strict=True):
        turns.append((start, templater.last_eos(whole, start, end) or end))
    last, end = turns[-1]
    # The template's tail after the last EOS is nothing that a reply should say; a reply without EOS gets one.
    closed = whole[last:end][-1:] == [templater.eos]
    whole = whole[:end] if closed else [*whole, templater.eos]
    turns[-1] = (last, len(whole))
    trained = [turn for turn, trains in zip(turns, layout.trains, strict=True) if trains]
    return Spans(whole, starts[0], trained, moved)


def _joined(
    templater: Templater, layout: Layout, prompt: list[int], whole: list[int]
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """The ids with a boundary at each reply's beginning, and [start, end) of each reply in them.

    None if the tokenizer writes something of its own where a text begins in the middle.
    """
    ids, bounds = list(prompt), []
    stops = [start for start, _ in layout.replies[1:]] + [len(layout.text)]
    for (start, end), stop in zip(layout.replies, stops, strict=True):
        piece, reply = templater.continued(layout.text[start:stop]), templater.continued(layout.text[start:end])
        if piece is None or reply is None:
            return None
        bounds.append((len(ids), len(ids) + common_prefix(reply, piece)))
        ids += piece
    decode = templater.tokenizer.decode
    return (ids, bounds) if decode(ids) == decode(whole) else None
