"""Chat templates -> text and token ids.

Where in them the replies are is found in `spans.py`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..patience import bounded
from .messages import TRAINS
from .pattern import Pattern, fills_in, read_pattern
from .pieces import pieces_of
from .rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers that bring none: a plain dialogue in the manner of HH-RLHF, each reply closed by EOS. Without special
# tokens of its own, so that a base model need learn no new embedding.
DEFAULT_CHAT_TEMPLATE = (
    "{% if tools %}{{ '\n\nTools: ' + (tools | tojson) }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\n\nAssistant: ' + message['content'] | trim }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}{{ '\n\nTool: ' + message['content'] | trim }}"
    "{% else %}{{ message['content'] | trim }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


MARK = "xPREFTUNExMARKx"
"""A word that no data hold: where it is found in a rendered conversation, there its message is."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = frozenset(ROLES) - {"developer"}
"""Roles that are rendered in one form alone."""
_PATTERNS = 512
"""So many shapes of conversations are kept."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields in which data write an assistant's reasoning beside its content."""

PATIENCE = 10.0
"""Seconds for a template on one conversation, which takes a thousandth of one."""
_LONG = 10_000_000

# How templates ask for today's date.
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# Templates that write today's date: one day for the whole process, unless the tokenizer was given its run's.
_TODAY = date.today()


def set_date(tokenizer: Any, day: date | None) -> None:
    """Make the templates that write today's date write `day`; None: the day on which this process started."""
    tokenizer.template_date = day or _TODAY


def writes_date(folder: Path, chat_template: str | None) -> bool:
    """Whether rows differ from day to day: the template writes today's date.

    Args:
        folder: of the tokenizer.
        chat_template: a file or Jinja text instead of the tokenizer's own, if there is one.
    """
    files = [folder / "chat_template.jinja", folder / "tokenizer_config.json"] if chat_template is None else []
    if chat_template is not None and "{" not in chat_template:
        files = [Path(chat_template).expanduser()]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return any("strftime_now" in text for text in (*texts, chat_template or ""))


def rendered(tokenizer: Any, messages: Any, where: str, **options: Any) -> str:
    """The messages as the tokenizer's template writes them: in transformers' sandbox, which gives a template no way to
    files or code, and within a limit of time, memory and length, which the sandbox does not set.

    Args:
        where: the place of the messages, for errors.
        options: further arguments of `apply_chat_template`.

    Raises:
        UserError: it goes past a limit.
    """
    what = "the chat template, which loops or multiplies without end on these messages,"
    remedy = "correct the template"
    text = bounded(
        lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options), PATIENCE, where, what, remedy
    )
    if len(text) > _LONG and len(text) > 10 * len(json.dumps([messages, options], default=str)):
        raise UserError(where, f"the chat template writes {len(text):,} characters of these messages", remedy)
    return text


class Templater:
    """One tokenizer's template, as text and as ids.

    Rendering and tokenising are separate so that many texts can be tokenised in one call.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        # transformers types ids and texts as anything that any tokenizer might return
        self.tokenizer: Any = tokenizer
        if self.tokenizer.eos_token_id is None:
            raise UserError("tokenizer", "it has no EOS token", "set eos_token: replies must end")
        self.eos: int = self.tokenizer.eos_token_id
        self.bos: int | None = self.tokenizer.bos_token_id
        # Our own template does not write BOS; tokenizers that put one before every text expect it all the same.
        self.ours = not tokenizer.chat_template or tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
        self.add_bos = self.ours and self.bos is not None and list(tokenizer("a").input_ids[:1]) == [self.bos]
        self.template = self._template(tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE)
        # The form of messages that the last row with calls was shown in: tried first for the next.
        self._form = 0
        self.pieces = pieces_of(tokenizer)
        self._fills: bool | None = None
        self._patterns: dict[tuple[str, ...], Pattern | None] = {}

    def begin(self) -> None:
        """Forget the rows of before: what is said of a chunk of rows depends on it alone."""
        self._form = 0

    def _template(self, template: Any) -> str | None:
        """The template with its run's day in the place of today's; None where the tokenizer has several of its own."""
        day: date = getattr(self.tokenizer, "template_date", _TODAY)
        if not isinstance(template, str):
            return None
        return _NOW.sub(lambda found: json.dumps(day.strftime(found[2]), ensure_ascii=False), template)

    def text(self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool, where: str = "") -> str:
        """The conversation as the template writes it.

        Args:
            generation_prompt: end in the beginning of a reply; of one that has begun, if the last message is an
                assistant's.

        Raises:
            UserError: the template refuses these messages (a system turn, roles that do not alternate, ...).
        """
        if (filled := self.filled(messages, tools, generation_prompt)) is not None:
            return filled
        begun = generation_prompt and bool(messages) and messages[-1]["role"] == "assistant"
        try:
            return rendered(
                self.tokenizer,
                messages,
                where or "chat template",
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=generation_prompt and not begun,
                continue_final_message=begun,
            )
        except UserError:
            raise
        except Exception as error:
            # Templates raise Jinja's errors, and through them any of Python's.
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                where or "chat template",
                f"the chat template refuses the turns {roles} ({' '.join(str(error).split())[:200]})",
                "correct the row or give another `chat_template`",
            ) from error

    def filled(self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool) -> str | None:
        """The same text by filling in the template's blanks; None where that is not all that it does (`pattern.py`)."""
        begun = generation_prompt and bool(messages) and messages[-1]["role"] == "assistant"
        if tools or begun or self._fills is False:
            return None
        contents = []
        for message in messages:
            content = message.get("content")
            if len(message) != 2 or not isinstance(content, str) or not content.strip():
                return None
            contents.append(content)
        # the empty role marks the generation prompt: no message has it
        key = (*(message["role"] for message in messages), *([""] if generation_prompt else []))
        if key not in self._patterns:
            self._learn(key, messages, generation_prompt)
        pattern = self._patterns[key]
        return None if pattern is None else pattern.fill(contents)

    def _learn(self, key: tuple[str, ...], messages: list[Message], generation_prompt: bool) -> None:
        """What the template writes for these roles, from two renderings of it."""
        if self._fills is None:
            self._fills = self.template is not None and fills_in(self.template)
        if len(self._patterns) >= _PATTERNS:
            self._patterns.clear()
        self._patterns[key] = None
        if not self._fills or not all(message["role"] for message in messages):
            return

        def render(contents: list[str]) -> str:
            said = [message | {"content": text} for message, text in zip(messages, contents, strict=True)]
            return self.text(said, None, generation_prompt)

        with suppress(UserError):  # refused: said where the row is rendered
            self._patterns[key] = read_pattern(render, len(messages))

    def fitted(
        self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool, where: str = ""
    ) -> tuple[list[Message], str]:
        """The messages in the form in which the template shows all that they say, and their text.

        Templates differ in what they want of a call: arguments as an object or as JSON text, no content beside it. The
        first form that shows every call, and every turn before the replies, is taken.

        Raises:
            UserError: there is none; what the first form refuses or leaves out is said.
        """
        # filled in, every content stands in the text as it is
        filled = self.filled(messages, tools, generation_prompt)
        if filled is not None and all(message["role"] in SPEAKERS for message in messages):
            return messages, filled
        forms = list(_forms(messages))
        problem = None
        for number in dict.fromkeys([min(self._form, len(forms) - 1), *range(len(forms))]):
            try:
                text = self.text(forms[number], tools, generation_prompt, where)
                self._check_shown(forms[number], text, tools, where)
            except UserError as error:
                problem = problem or error
                continue
            self._form = number if len(forms) > 1 else self._form
            return forms[number], text
        assert problem is not None
        raise problem

    def _check_shown(self, messages: list[Message], whole: str, tools: list[Any] | None, where: str) -> None:
        for number, message in enumerate(messages):
            if message["role"] not in ROLES:
                self._check_role(messages, number, tools, where)
            for call in message.get("tool_calls") or ():
                if not shows_call(whole, call):
                    raise self.lost(where, f"the call of {call['function']['name']!r}")
            # A template may write what a user says otherwise (escaped, shortened): it is gone if nothing comes through.
            if message["role"] == "assistant" or shows(whole, message["content"]):
                continue  # what an assistant says is compared reply by reply (`spans.py`)
            if MARK not in self.text(marked(messages, number, after=MARK), tools, False, where):
                raise self.lost(where, f"the turn of the role {message['role']!r}: {snippet(message['content'])}")

    def _check_role(self, messages: list[Message], number: int, tools: list[Any] | None, where: str) -> None:
        """A role of the data's own must come through by its name, or nobody could tell who speaks."""
        role = str(messages[number]["role"])
        before = self.text(marked(messages, number, before=MARK), tools, False, where).partition(MARK)[0]
        if self.ours or not before.rstrip("\n :>|]*").endswith(role):
            known = ", ".join(ROLES)
            raise UserError(where, f"the chat template does not know the role {role!r}", f"rename it to one of {known}")

    def lost(self, where: str, what: str) -> UserError:
        """The error of a row of which the template would leave something out."""
        remedy = "take it out of the row, or give a `chat_template` that writes it"
        return UserError(where or "chat template", f"the chat template leaves out {what}", remedy)

    def continued(self, text: str) -> list[int] | None:
        """Ids of a text that follows another, without what the tokenizer puts before a beginning; None if it cannot."""
        ids = list(
            self.tokenizer(self.tokenizer.eos_token + text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        return ids[1:] if ids[:1] == [self.eos] else None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of templated texts, each with one BOS at most."""
        if not texts:
            return []
        if self.pieces is not None:
            batch = self.pieces.ids(texts)
        else:
            batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._one_bos(list(ids)) for ids in batch]

    def _one_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        while ids[:2] == [self.bos, self.bos]:
            ids = ids[1:]
        return [self.bos, *ids] if self.add_bos and ids[:1] != [self.bos] else ids

    def last_eos(self, ids: Sequence[int], start: int, end: int) -> int | None:
        """Position after the EOS that ends ids[start:end], or None.

        Of two with nothing but white space between them, as templates write that close the dialogue after the last
        turn's end, it is the first.
        """
        said = ids[start:end]
        if (count := said.count(self.eos)) <= 1:  # counted and found in C: as good as every reply has one
            return start + said.index(self.eos) + 1 if count else None
        last = next((i for i in range(end, start, -1) if ids[i - 1] == self.eos), None)
        while last is not None:
            before = next((i for i in range(last - 1, start, -1) if ids[i - 1] == self.eos), None)
            if before is None or self.tokenizer.decode(ids[before : last - 1]).strip():
                break
            last = before
        return last


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: list[Any] | None = None
) -> list[int]:
    """Ids of the templated prompt with its generation prompt, which a reply is sampled from."""
    templater = Templater(tokenizer)
    return templater.ids([templater.fitted(messages, tools, generation_prompt=True)[1]])[0]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # one comparison in C: most prefixes that are asked about are whole
        return n
    return next(i for i in range(n) if a[i] != b[i])


def marked(messages: list[Message], number: int, before: str = "", after: str = "") -> list[Message]:
    """The messages with something written before or after the content of one of them."""
    message = messages[number]
    content = before + (message["content"] or "") + after
    return [*messages[:number], message | {"content": content}, *messages[number + 1 :]]


def shows(text: str, said: str | None) -> bool:
    """Whether `said` stands in `text`, white space aside, as it is or as JSON writes it."""
    bare = (said or "").strip()
    if bare in text:
        return True
    tight = "".join(text.split())
    forms = (bare, json.dumps(bare, ensure_ascii=False)[1:-1], json.dumps(bare)[1:-1])
    return any("".join(form.split()) in tight for form in forms)


def shows_call(text: str, call: dict[str, Any]) -> bool:
    """Whether `text` has the call's name and every value of its arguments."""
    function = call["function"]
    return shows(text, function["name"]) and all(shows(text, value) for value in _values(function["arguments"]))


def _values(arguments: Any) -> Iterator[str]:
    if isinstance(arguments, str):
        try:
            inner = json.loads(arguments)
        except ValueError:
            inner = None
        # text that holds JSON: its values count, however the template spaces them
        if isinstance(inner, dict | list):
            yield from _values(inner)
        else:
            yield arguments
    elif isinstance(arguments, dict | list):
        for value in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _values(value)
    elif isinstance(arguments, int | float) and not isinstance(arguments, bool):
        yield json.dumps(arguments)


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are, then in the other forms that templates may want."""
    messages = [{name: value for name, value in message.items() if name != TRAINS} for message in messages]
    yield messages
    if any(message.get("tool_calls") for message in messages):
        silent = [_without_content(message) for message in messages]
        yield silent
        yield [_with_text_arguments(message) for message in messages]
        yield [_with_text_arguments(message) for message in silent]
    if any(message["role"] == "developer" for message in messages):
        yield [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]


def _without_content(message: Message) -> Message:
    return message | {"content": None} if message.get("tool_calls") and not message["content"] else message


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def snippet(text: str | None) -> str:
    """A text, shortened for an error message."""
    bare = " ".join((text or "").split())
    return repr(bare if len(bare) <= 60 else bare[:57] + "...")
