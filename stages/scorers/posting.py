"""Requests to a server, of scores or of replies: several at once, sent again after passing failures.

The key comes from the environment, goes into one header and nowhere else: what the server says is cleared of it before
anybody reads it.
"""

import json
import random
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import httpx2 as httpx

from ... import stopping
from ...errors import UserError

_T = TypeVar("_T")
_R = TypeVar("_R")

# Seconds: the longest wait of our own, and the longest that a server may ask for.
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 300.0
_SHOWN = 200
_SHORTEST_SECRET = 8
_LOOKS = 0.5
"""Seconds after which who waits for answers looks whether it was asked to stop."""


class Server(Protocol):
    """Where to ask, and how (see `endpoint_client.Endpoint`)."""

    @property
    def where(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def key_env(self) -> str: ...
    @property
    def key(self) -> str | None: ...
    @property
    def retries(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def timeout(self) -> float: ...


class Unanswered(UserError):
    """A request without an answer after all retries, or one that the server refuses: another one may fare better.

    Args:
        reached: False: there is no server at that address.
        status: what it answered; None: nothing.
    """

    def __init__(
        self, where: str, problem: str, remedy: str, *, reached: bool = True, status: int | None = None
    ) -> None:
        self.reached, self.status = reached, status
        super().__init__(where, problem, remedy)


class NotThere(UserError):
    """The server answers, and has nothing at that address, or of the name that was asked for."""


class _Stopped(Exception):
    """Another request failed for good, so this one is not sent again."""


class Poster:
    """Sends requests to one server.

    Args:
        error_inside: (a good answer) -> the status of an error that stands in it; None: there is none.
        remedies: what to do about an address that does not answer, one that is unknown, and a request that is refused.
    """

    def __init__(
        self,
        server: Server,
        remedies: tuple[str, str, str],
        error_inside: Callable[[httpx.Response], int | None] = lambda response: None,
    ) -> None:
        self.server, self.remedies, self.error_inside = server, remedies, error_inside
        self._jitter = random.Random()

    def send_all(
        self,
        jobs: Mapping[_T, dict[str, Any] | None],
        read: Callable[[_T, httpx.Response, int], _R],
        take: Callable[[_T, _R], None],
        on_unanswered: Callable[[_T, Unanswered], None] | None = None,
    ) -> None:
        """Post every body, as many at a time as the server allows; what has none is asked for with GET.

        Args:
            read: what a good answer to a job says; also given is how often the request was sent again. It runs in the
                threads, as soon as the answer is there.
            take: told of what was read, in this thread.
            on_unanswered: told of a request that failed for good, in this thread; it may raise. None: its error is
                raised. What any of them raises ends all requests.

        Raises:
            UserError: the server takes no key of ours; or what the functions raise.
        """
        server, stop = self.server, threading.Event()
        headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
        # the threads are the limit; the library's own, 100 connections, would only let requests wait in vain
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=server.concurrency)
        with (
            httpx.Client(headers=headers, timeout=server.timeout, limits=limits) as http,
            ThreadPoolExecutor(server.concurrency) as pool,
        ):

            def work(job: _T) -> _R:
                return read(job, *self._ask_until_answered(http, jobs[job], stop))

            futures = {pool.submit(work, job): job for job in jobs}
            try:
                for future in _as_completed(futures):
                    error = future.exception()
                    if isinstance(error, Unanswered) and on_unanswered is not None:
                        on_unanswered(futures[future], error)
                    else:
                        take(futures[future], future.result())
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _ask_until_answered(
        self, http: httpx.Client, body: dict[str, Any] | None, stop: threading.Event
    ) -> tuple[httpx.Response, int]:
        server = self.server
        problem, reached, last = "", True, None
        for attempt in range(server.retries + 1):
            asked_to_wait = 0.0
            try:
                response = http.get(server.address) if body is None else http.post(server.address, json=body)
            except httpx.RequestError as error:
                last = None
                reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                problem = f"cannot be reached ({type(error).__name__}: {self.hide(str(error))})"
            else:
                reached = True
                status, inside = response.status_code, self.error_inside(response)
                if response.is_success and inside is None:
                    return response, attempt
                status = status if inside is None else inside
                if status not in (408, 429) and status < 500:
                    raise self._refused(response, status)
                problem, last = f"answered {status}{self.said(response)}", status
                asked_to_wait = _retry_after(response)
            if attempt < server.retries:
                own = min(2.0**attempt, LONGEST_WAIT) * self._jitter.uniform(0.75, 1.25)
                pause(max(own, asked_to_wait), stop)
        said = f"{server.address} {problem}, after {server.retries} retries"
        raise Unanswered(server.where, said, self.remedies[0], reached=reached, status=last)

    def _refused(self, response: httpx.Response, status: int) -> UserError:
        server = self.server
        if status in (401, 403):
            # Servers like to repeat a part of the key that they do not know, so theirs is not shown.
            said = f"{server.address} answered {status}"
            lacking = "" if server.key else ", which is not set"
            return UserError(server.where, said, f"put a key that it takes into ${server.key_env}{lacking}")
        said = f"{server.address} answered {status}{self.said(response)}"
        if status < 400 or status == 404:
            return NotThere(server.where, said, self.remedies[1])
        return Unanswered(server.where, said, self.remedies[2], status=status)

    def said(self, response: httpx.Response) -> str:
        """The server's own words, in one line and without the key, to stand in an error."""
        text = response.text
        try:
            given = json.loads(text)
            error = said_error(given) or given
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError, RecursionError):
            pass
        line = " ".join(self.hide(text).split())
        return f" ({line[:_SHOWN]})" if line else ""

    def hide(self, text: str) -> str:
        """The text without the key."""
        key = self.server.key
        # Servers at home take any word for a key; such a word is no secret, and may stand in an answer.
        return text if key is None or len(key) < _SHORTEST_SECRET else text.replace(key, "***")


def _as_completed(futures: Iterable[Future[_R]]) -> Generator[Future[_R]]:
    """Each of them when it is done. Raises Stopped where this process was asked to stop and may leave off."""
    left = set(futures)
    while left:
        done, left = wait(left, _LOOKS, FIRST_COMPLETED)
        stopping.poll()
        yield from done


def pause(seconds: float, stop: threading.Event) -> None:
    """Waits, unless there is nothing to wait for any more. Raises _Stopped then."""
    if stop.wait(seconds):
        raise _Stopped


def said_error(given: Any) -> Any:
    """What an answer says of an error, in its own place or in that of its first choice; None where it says nothing."""
    if not isinstance(given, dict):
        return None
    choices = given.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if first is None:
        return given.get("error")
    return first.get("error") or ("an error" if first.get("finish_reason") == "error" else None)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks us to wait; 0 where it does not, or names a date."""
    try:
        asked = float(response.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return min(asked, LONGEST_RETRY_AFTER) if asked > 0 else 0.0
