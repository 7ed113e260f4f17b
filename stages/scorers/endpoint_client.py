"""A client of an OpenAI-compatible chat endpoint: several requests at once, sent again after passing failures, every
answer that says what was asked kept, everything counted.

The key comes from the environment, goes into one header and nowhere else: what the server says is cleared of it before
anybody reads it.
"""

import hashlib
import json
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import httpx2 as httpx

from ...errors import UserError
from .endpoint_answers import Answers
from .unread import unread_words

Messages = list[dict[str, str]]
WhyUnread = Callable[[str, str | None], str | None]


# Seconds: the longest wait of our own, and the longest that a server may ask for.
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 300.0
_SHOWN = 200
_SHORTEST_SECRET = 8


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


class _Stopped(Exception):
    """Another request failed for good, so this one is not sent again."""


class Client:
    """Asks an endpoint; `usage` counts over all calls of `ask`.

    Args:
        why_unread: (text, finish_reason) -> why the answer says nothing of what was asked; None: it does. Only such
            answers are kept.
    """

    def __init__(self, endpoint: Endpoint, answers: Answers, why_unread: WhyUnread = lambda text, finish: None) -> None:
        self.endpoint, self.answers, self.why_unread = endpoint, answers, why_unread
        self.usage = Usage(cost=None if endpoint.price is None else 0.0)
        self._asked: dict[str, str] = {}
        self._jitter = random.Random()

    def ask(self, conversations: Sequence[Messages], on_answer: Callable[[int], None] | None = None) -> list[str]:
        """The model's answers, in the conversations' order, "" for one that says nothing of what was asked; equal
        conversations are asked once.

        Args:
            on_answer: called with the number of answers that have come so far.

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
            self._send(wanted, on_answer)
        return [self._asked[key] for key in keys]

    def _send(self, wanted: dict[str, Messages], on_answer: Callable[[int], None] | None) -> None:
        """All requests, as many at a time as the endpoint allows; the first that fails for good ends them all."""
        endpoint, stop = self.endpoint, threading.Event()
        headers = {} if endpoint.key is None else {"Authorization": f"Bearer {endpoint.key}"}
        # the threads are the limit; the library's own, 100 connections, would only let requests wait in vain
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency)
        with (
            httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits) as http,
            ThreadPoolExecutor(endpoint.concurrency) as pool,
        ):
            futures = {pool.submit(self._answer, http, key, wanted[key], stop): key for key in wanted}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    self._count(futures[future], future.result())
                    if on_answer is not None:
                        on_answer(done)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

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

    def _answer(self, http: httpx.Client, key: str, messages: Messages, stop: threading.Event) -> _Answer:
        """One answer, kept as soon as it is there: it is paid for, whatever becomes of the others."""
        endpoint = self.endpoint
        answer = self._ask_until_answered(http, messages, stop)
        if self.why_unread(answer.text, answer.finish) is None:
            self.answers.put(
                key,
                {
                    "url": endpoint.url,
                    "model": endpoint.model,
                    "parameters": endpoint.parameters,
                    "messages": messages,
                    "answer": answer.text,
                },
            )
        return answer

    def _ask_until_answered(self, http: httpx.Client, messages: Messages, stop: threading.Event) -> _Answer:
        endpoint = self.endpoint
        body = {"model": endpoint.model, "messages": messages, **endpoint.parameters}
        problem = ""
        for attempt in range(endpoint.retries + 1):
            asked_to_wait = 0.0
            try:
                response = http.post(endpoint.address, json=body)
            except httpx.RequestError as error:
                problem = f"cannot be reached ({type(error).__name__}: {self._hide(str(error))})"
            else:
                status, inside = response.status_code, _error_inside(response)
                if response.is_success and inside is None:
                    return self._read(response, attempt)
                status = status if inside is None else inside
                if status not in (408, 429) and status < 500:
                    raise self._refused(response, status)
                problem = f"answered {status}{self._said(response)}"
                asked_to_wait = _retry_after(response)
            if attempt < endpoint.retries:
                own = min(2.0**attempt, LONGEST_WAIT) * self._jitter.uniform(0.75, 1.25)
                pause(max(own, asked_to_wait), stop)
        raise UserError(
            endpoint.where,
            f"{endpoint.address} {problem}, after {endpoint.retries} retries",
            "see that the server runs, or lower concurrency, and start again: answers so far are kept",
        )

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
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                self.endpoint.where,
                f"{self.endpoint.address} gave no chat completion{self._said(response)}",
                "give the url of an OpenAI-compatible endpoint, up to /chat/completions",
            ) from None
        finish = choice.get("finish_reason")
        return _Answer(self._hide(text), finish if isinstance(finish, str) else None, retries, counts[0], counts[1])

    def _refused(self, response: httpx.Response, status: int) -> UserError:
        endpoint = self.endpoint
        if status in (401, 403):
            # Servers like to repeat a part of the key that they do not know, so theirs is not shown.
            said = f"{endpoint.address} answered {status}"
            lacking = "" if endpoint.key else ", which is not set"
            return UserError(endpoint.where, said, f"put a key that it takes into ${endpoint.key_env}{lacking}")
        remedy = "correct url or model" if status < 400 or status == 404 else "correct model or parameters"
        return UserError(endpoint.where, f"{endpoint.address} answered {status}{self._said(response)}", remedy)

    def _said(self, response: httpx.Response) -> str:
        """The server's own words, in one line and without the key, to stand in an error."""
        text = response.text
        try:
            given = json.loads(text)
            error = _said_error(given) or given
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            pass
        line = " ".join(self._hide(text).split())
        return f" ({line[:_SHOWN]})" if line else ""

    def _hide(self, text: str) -> str:
        key = self.endpoint.key
        # Servers at home take any word for a key; such a word is no secret, and may stand in an answer.
        return text if key is None or len(key) < _SHORTEST_SECRET else text.replace(key, "***")


def pause(seconds: float, stop: threading.Event) -> None:
    """Waits, unless there is nothing to wait for any more. Raises _Stopped then."""
    if stop.wait(seconds):
        raise _Stopped


def _joined(content: Any) -> Any:
    """The text of a message whose content is a text, nothing, or a list of parts, less what is no text."""
    if not isinstance(content, list):
        return content or ""
    said = [part if isinstance(part, str) else part["text"] for part in content if _is_text(part)]
    return "".join(said)


def _is_text(part: Any) -> bool:
    """Whether a part is said to the reader; thoughts, images and calls are not."""
    return isinstance(part, str) or part.get("type") in (None, "text", "output_text")


def _said_error(given: Any) -> Any:
    """What an answer says of an error, in its own place or in that of its first choice; None where it says nothing."""
    if not isinstance(given, dict):
        return None
    choices = given.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if first is None:
        return given.get("error")
    return first.get("error") or ("an error" if first.get("finish_reason") == "error" else None)


def _error_inside(response: httpx.Response) -> int | None:
    """The status of a provider's error that came inside a good answer, 502 where it has none; None: there is none."""
    if not response.is_success:
        return None
    try:
        error = _said_error(json.loads(response.text))
    except ValueError:
        return None
    if not error:
        return None
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600 else 502


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks us to wait; 0 where it does not, or names a date."""
    try:
        asked = float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return min(asked, LONGEST_RETRY_AFTER) if asked > 0 else 0.0
