"""A client of an OpenAI-compatible chat endpoint: every answer that says what was asked is kept, everything counted."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import httpx2 as httpx

from ...errors import UserError
from .endpoint_answers import Answers
from .posting import Poster, Unanswered, said_error
from .unread import unread_words

Messages = list[dict[str, str]]
WhyUnread = Callable[[str, str | None], str | None]

_REMEDIES = (
    "see that the server runs, or lower concurrency, and start again: answers so far are kept",
    "correct url or model",
    "correct model or parameters",
)


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how.

    Attributes:
        where: the judge's place in the recipe, for errors.
        url: what comes before `/chat/completions`.
        model: the model's name there.
        key_env: the environment variable that holds the key.
        key: what it holds; None: no key is sent.
        parameters: further fields of the request's body, such as temperature.
        retries: how often a request is sent again after 429, 5xx or a failed connection.
        concurrency: requests under way at a time.
        timeout: seconds to wait for a connection, and for each piece of an answer.
        price: of a million tokens read and written; None: unknown.
    """

    where: str
    url: str
    model: str
    key_env: str
    key: str | None = field(default=None, repr=False)
    parameters: dict[str, Any] = field(default_factory=dict)
    retries: int = 6
    concurrency: int = 8
    timeout: float = 120.0
    price: tuple[float, float] | None = None

    @property
    def address(self) -> str:
        return f"{self.url}/chat/completions"

    def key_of(self, messages: Messages) -> str:
        """The hash of everything that shapes an answer, and of nothing secret."""
        asked = [self.url, self.model, messages, self.parameters]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass
class Usage:
    """What a judge has cost so far.

    Attributes:
        requests: sent, those that failed included.
        retries: of these, the ones sent again.
        cached: answers that were kept from before and cost nothing.
        prompt_tokens, completion_tokens: as the server counts them.
        cost: in the currency of the recipe's prices; None without prices.
        unread: why an answer says nothing of what was asked -> how many; they are not kept, and asked for again.
    """

    requests: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    unread: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4g}"
        unread = f"; {unread_words(self.unread)}" if self.unread else ""
        return (
            f"{self.requests} requests ({self.retries} of them sent again), {self.cached} answers from the cache, "
            f"{self.prompt_tokens} tokens read and {self.completion_tokens} written{cost}{unread}"
        )


@runtime_checkable
class Metered(Protocol):
    """A judge that counts what it costs."""

    @property
    def usage(self) -> Usage: ...


@dataclass(frozen=True)
class _Answer:
    """text: the model's. finish: why it ended there. retries: requests before it that failed. prompt_tokens,
    completion_tokens: its own."""

    text: str
    finish: str | None
    retries: int
    prompt_tokens: int
    completion_tokens: int


class Client:
    """Asks an endpoint; `usage` counts over all calls of `ask`.

    Args:
        why_unread: (text, finish_reason) -> why the answer says nothing of what was asked; None: it does. Only such
            answers are kept.
    """

    def __init__(self, endpoint: Endpoint, answers: Answers, why_unread: WhyUnread = lambda text, finish: None) -> None:
        self.endpoint, self.answers, self.why_unread = endpoint, answers, why_unread
        self.usage = Usage(cost=None if endpoint.price is None else 0.0)
        self.poster = Poster(endpoint, _REMEDIES, _error_inside)
        self._asked: dict[str, str] = {}

    def ask(
        self,
        conversations: Sequence[Messages],
        on_answer: Callable[[int], None] | None = None,
        on_unanswered: Callable[[str, Unanswered], None] | None = None,
    ) -> list[str]:
        """The model's answers, in the conversations' order, "" for one that says nothing of what was asked; equal
        conversations are asked once.

        Args:
            on_answer: called with the number of answers that have come so far.
            on_unanswered: called with the key of a conversation (`Endpoint.key_of`) that has no answer after all
                retries, and its error; its answer is "" then. None: the error is raised.

        Raises:
            UserError: the endpoint refused a request, gave something else than an answer, or could not be reached
                after all retries. Answers that came before are kept.
        """
        keys = [self.endpoint.key_of(messages) for messages in conversations]
        wanted = {key: m for key, m in zip(keys, conversations, strict=True) if key not in self._asked}
        for key in list(wanted):
            kept = self.answers.get(key)
            if kept is not None and self.why_unread(kept, None) is None:
                self._asked[key] = kept
                self.usage.cached += 1
                del wanted[key]
        if wanted:
            self._send(wanted, on_answer, on_unanswered)
        return [self._asked[key] for key in keys]

    def forget(self, conversations: Sequence[Messages] | None = None) -> None:
        """Let go of what was answered (None: of everything): it is looked up again, or asked for anew."""
        for key in list(self._asked) if conversations is None else map(self.endpoint.key_of, conversations):
            self._asked.pop(key, None)

    def _send(
        self,
        wanted: dict[str, Messages],
        on_answer: Callable[[int], None] | None,
        on_unanswered: Callable[[str, Unanswered], None] | None,
    ) -> None:
        endpoint, done = self.endpoint, 0
        said = {"model": endpoint.model, **endpoint.parameters}
        bodies = {key: {**said, "messages": messages} for key, messages in wanted.items()}

        def read(key: str, response: httpx.Response, retries: int) -> _Answer:
            """Kept as soon as it is there: it is paid for, whatever becomes of the others."""
            answer = self._read(response, retries)
            if self.why_unread(answer.text, answer.finish) is None:
                self._keep(key, wanted[key], answer.text)
            return answer

        def take(key: str, answer: _Answer) -> None:
            nonlocal done
            done += 1
            self._count(key, answer)
            if on_answer is not None:
                on_answer(done)

        def fail(key: str, error: Unanswered) -> None:
            assert on_unanswered is not None
            on_unanswered(key, error)
            self._asked[key] = ""

        self.poster.send_all(bodies, read, take, None if on_unanswered is None else fail)

    def _keep(self, key: str, messages: Messages, text: str) -> None:
        endpoint = self.endpoint
        said = {"url": endpoint.url, "model": endpoint.model, "parameters": endpoint.parameters}
        self.answers.put(key, {**said, "messages": messages, "answer": text})

    def _count(self, key: str, answer: _Answer) -> None:
        unread = self.why_unread(answer.text, answer.finish)
        self._asked[key] = "" if unread is not None else answer.text
        if unread is not None:
            self.usage.unread[unread] = self.usage.unread.get(unread, 0) + 1
        usage, price = self.usage, self.endpoint.price
        usage.requests += 1 + answer.retries
        usage.retries += answer.retries
        usage.prompt_tokens += answer.prompt_tokens
        usage.completion_tokens += answer.completion_tokens
        if price is not None:
            usage.cost = (usage.prompt_tokens * price[0] + usage.completion_tokens * price[1]) / 1e6

    def _read(self, response: httpx.Response, retries: int) -> _Answer:
        """A chat completion; a model that said nothing (a refusal, thoughts cut short) has said ""."""
        try:
            given = json.loads(response.text)
            choice = given["choices"][0]
            text = _joined(choice["message"]["content"])
            used = given.get("usage") or {}
            counts = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError(text)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(
                self.endpoint.where,
                f"{self.endpoint.address} gave no chat completion{self.poster.said(response)}",
                "give the url of an OpenAI-compatible endpoint, up to /chat/completions",
            ) from None
        finish = choice.get("finish_reason")
        return _Answer(
            self.poster.hide(text), finish if isinstance(finish, str) else None, retries, counts[0], counts[1]
        )


def _joined(content: Any) -> Any:
    """The text of a message whose content is a text, nothing, or a list of parts, less what is no text."""
    if not isinstance(content, list):
        return content or ""
    said = [part if isinstance(part, str) else part["text"] for part in content if _is_text(part)]
    return "".join(said)


def _is_text(part: Any) -> bool:
    """Whether a part is said to the reader; thoughts, images and calls are not."""
    return isinstance(part, str) or part.get("type") in (None, "text", "output_text")


def _error_inside(response: httpx.Response) -> int | None:
    """The status of a provider's error that came inside a good answer, 502 where it has none; None: there is none."""
    if not response.is_success:
        return None
    try:
        error = said_error(json.loads(response.text))
    except (ValueError, RecursionError):
        return None
    if not error:
        return None
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600 else 502
