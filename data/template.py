"""Chat templates -> token ids, and where in those ids the replies are.

A boundary is always found in the ids of the templated WHOLE conversation, never by tokenising two strings apart: a
tokenizer may merge across the seam. The prompt's ids are those of the template with its generation prompt; the reply
begins where the conversation's ids first differ from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
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
        ours = not tokenizer.chat_template or tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
        self.add_bos = ours and self.bos is not None and list(tokenizer("a").input_ids[:1]) == [self.bos]
        self.template = DEFAULT_CHAT_TEMPLATE if not tokenizer.chat_template else None

    def text(self, messages: list[Message], tools: list[Any] | None, generation_prompt: bool, where: str = "") -> str:
        """The conversation as the template writes it.

        Raises:
            UserError: the template refuses these messages (a system turn, roles that do not alternate, ...).
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except Exception as error:
            # Templates raise Jinja's errors, and through them any of Python's.
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                where or "chat template",
                f"the chat template refuses the turns {roles} ({' '.join(str(error).split())[:200]})",
                "correct the row or give another `chat_template`",
            ) from error

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of templated texts, each with one BOS at most."""
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._one_bos(list(ids)) for ids in batch]

    def _one_bos(self, ids: list[int]) -> list[int]:
        if self.bos is None:
            return ids
        while ids[:2] == [self.bos, self.bos]:
            ids = ids[1:]
        return [self.bos, *ids] if self.add_bos and ids[:1] != [self.bos] else ids

    def last_eos(self, ids: Sequence[int], start: int, end: int) -> int | None:
        """Position after the last EOS in ids[start:end], or None."""
        return next((i for i in range(end, start, -1) if ids[i - 1] == self.eos), None)


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: list[Any] | None = None
) -> list[int]:
    """Ids of the templated prompt with its generation prompt, which a reply is sampled from."""
    templater = Templater(tokenizer)
    return templater.ids([templater.text(messages, tools, generation_prompt=True)])[0]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # one comparison in C: most prefixes that are asked about are whole
        return n
    return next(i for i in range(n) if a[i] != b[i])


@dataclass(frozen=True)
class Spans:
    """A templated conversation and the parts of it that an assistant wrote.

    ids: the conversation up to the EOS of its last reply.
    prompt: number of ids before the first reply.
    trained: [start, end) of each reply to train on, its EOS included.
    moved: the prompt's ids are not a prefix of the conversation's; the boundary is where they first differ.
    last_only: the turns could not be told apart, so only the last one is trained on.
    """

    ids: list[int]
    prompt: int
    trained: list[tuple[int, int]]
    moved: bool = False
    last_only: bool = False


def span_texts(
    templater: Templater, prompt: list[Message], completion: list[Message], tools: list[Any] | None, where: str
) -> list[str]:
    """The texts whose ids `find_spans` compares.

    The whole conversation; then, for each reply, the conversation before it with the generation prompt, and (except for
    the last reply) the conversation up to its end without the generation prompt.
    """
    whole = prompt + completion
    texts = [templater.text(whole, tools, False, where)]
    for end in reply_ends(prompt, completion):
        texts.append(templater.text(whole[: end - 1], tools, True, where))
        if end < len(whole):
            texts.append(templater.text(whole[:end], tools, False, where))
    return texts


def reply_ends(prompt: list[Message], completion: list[Message]) -> list[int]:
    """For each assistant turn of the completion, the number of messages up to and including it."""
    start = len(prompt) + 1
    return [start + i for i, message in enumerate(completion) if message["role"] == "assistant"]


def find_spans(templater: Templater, ids: Sequence[list[int]]) -> Spans:
    """Where the replies are.

    Args:
        ids: of the texts that `span_texts` returns, in its order.
    """
    whole, befores, afters = ids[0], list(ids[1::2]), list(ids[2::2])
    starts = [common_prefix(before, whole) for before in befores]
    ends = [common_prefix(after, whole) for after in afters]
    agree = all(start == len(before) for start, before in zip(starts, befores, strict=True)) and all(
        end == len(after) for end, after in zip(ends, afters, strict=True)
    )
    last = starts[-1]
    end = templater.last_eos(whole, last, len(whole))
    # The template's tail after the last EOS is nothing that a reply should say; a reply without EOS gets one.
    whole = [*whole, templater.eos] if end is None else whole[:end]
    final = (last, len(whole))
    if len(starts) == 1:
        return Spans(whole, last, [final], moved=not agree)
    if not agree:
        return Spans(whole, starts[0], [final], moved=last < len(befores[-1]), last_only=True)
    turns = [(start, templater.last_eos(whole, start, stop) or stop) for start, stop in zip(starts, ends, strict=False)]
    return Spans(whole, starts[0], [*turns, final])
