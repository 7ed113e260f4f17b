"""Scores from a server over HTTP, in one of the shapes of `http_formats`.

      url: http://127.0.0.1:5000/get_reward
      format: plain                        # or openrlhf, verl
      column: answer                       # openrlhf's labels, verl's ground_truth: a column of the data
      batch_size: 32                       # replies in a request; verl's has one
      api_key_env: NAME                    # the variable that holds a key, sent as a bearer token; default: none is
      concurrency: 8                       # requests at a time
      retries: 6                           # after 429, 5xx or a failed connection, waiting longer each time
      timeout: 120                         # seconds
      cache: FOLDER                        # kept scores; default: eval-cache in the run folder; false: none are

A request that fails with several replies in it is made again for each of them alone, and so is a reply whose score is
no finite number: what fails then is that reply's failure.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from transformers import PreTrainedTokenizerBase

from ...errors import UserError, nearest
from .endpoint_answers import Answers
from .http_formats import FORMATS, Asked, Format
from .posting import Poster, Unanswered
from .replies import Failures, Replies, wrong_score
from .servers import address, cache_folder, key_of, number

_REMEDIES = (
    "see that the server runs, and start again: scores so far are kept",
    "correct the url",
    "see what the server says of it, or say on_failure",
)
_WRONG_ANSWER = "see that the server answers in the shape that format says, one finite number a reply"


@dataclass(frozen=True)
class RewardServer:
    """A server of scores (see `posting.Server`). format: its name in `FORMATS`. column: the data's column that it is
    told beside the rest."""

    where: str
    address: str
    format: str = "plain"
    column: str | None = None
    batch_size: int = 32
    key_env: str = ""
    key: str | None = field(default=None, repr=False)
    retries: int = 6
    concurrency: int = 8
    timeout: float = 120.0

    @property
    def shape(self) -> Format:
        return FORMATS[self.format]


def read_server(entry: Mapping[str, Any], where: str, *, key_needed: bool = True) -> RewardServer:
    """The server that an entry names, its key read from the environment; no request is sent.

    Raises:
        UserError: a missing or malformed field, or a named variable that is not set.
    """
    said = entry.get("format", "plain")
    if said not in FORMATS:
        remedy = nearest(said, FORMATS) if isinstance(said, str) else "correct it, or leave it out"
        raise UserError(f"{where}.format", f"is {said!r}, expected {', '.join(FORMATS)}", remedy)
    column = entry.get("column")
    if column is not None and (not isinstance(column, str) or not column):
        raise UserError(f"{where}.column", f"is {column!r}, expected a column's name", "write column: answer, say")
    if column is not None and said == "plain":
        raise UserError(f"{where}.column", "has no effect: format plain sends every column", "leave it out")
    if "batch_size" in entry and FORMATS[said].single:
        raise UserError(
            f"{where}.batch_size", f"has no effect: format {said} sends one reply a request", "leave it out"
        )
    key_env, key = key_of(entry, where, None, needed=key_needed)
    return RewardServer(
        where=where,
        address=address(entry, where, "write url: http://127.0.0.1:5000/get_reward, say"),
        format=said,
        column=column,
        batch_size=1 if FORMATS[said].single else int(number(entry, "batch_size", 32, where, low=1, whole=True)),
        key_env=key_env,
        key=key,
        retries=int(number(entry, "retries", 6, where, low=0, whole=True)),
        concurrency=int(number(entry, "concurrency", 8, where, low=1, whole=True)),
        timeout=number(entry, "timeout", 120.0, where, low=0.001),
    )


class HttpScorer:
    """A server as a source of scores; equal replies to equal prompts are asked about once.

    Args:
        answers: what it said before.
        tokenizer: the policy's, for shapes that tell the tokens as text.
    """

    def __init__(
        self, server: RewardServer, answers: Answers, failures: Failures, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.server, self.answers, self.failures, self.tokenizer = server, answers, failures, tokenizer
        self.poster = Poster(server, _REMEDIES)

    @classmethod
    def of(
        cls,
        entry: Mapping[str, Any],
        where: str,
        failures: Failures,
        tokenizer: PreTrainedTokenizerBase | None,
        run_dir: Path | None,
    ) -> "HttpScorer":
        """From a recipe's entry (see the module)."""
        return cls(read_server(entry, where), Answers(cache_folder(entry, where, run_dir), where), failures, tokenizer)

    def __call__(self, replies: Replies) -> list[float]:
        asked = [self._asked(replies, place) for place in range(len(replies))]
        keys = [self._key(each) for each in asked]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        found = {key: score for key in first if (score := self._kept(key)) is not None}
        wanted = [key for key in first if key not in found]
        why: dict[str, str] = {}
        size = self.server.batch_size
        self._ask([wanted[start : start + size] for start in range(0, len(wanted), size)], asked, first, found, why)
        if again := [[key] for key in why]:
            why.clear()
            self._ask(again, asked, first, found, why, replies)
        failed = {place: why[key] for place, key in enumerate(keys) if key in why}
        return self.failures.settled(replies, [found.get(key) for key in keys], failed, _WRONG_ANSWER)

    def _ask(
        self,
        batches: list[list[str]],
        asked: Sequence[Asked],
        first: Mapping[str, int],
        found: dict[str, float],
        why: dict[str, str],
        last: Replies | None = None,
    ) -> None:
        """Ask about replies by their keys: scores go into `found`, what is wrong into `why`.

        Args:
            first: key -> a place that has it.
            last: all replies, where a failure is the last: it may then be raised at once.
        """
        jobs = {tuple(keys): self.server.shape.body([asked[first[key]] for key in keys]) for keys in batches if keys}

        def read(keys: tuple[str, ...], response: httpx.Response, retries: int) -> list[Any]:
            del retries
            scores = self._scores(response, len(keys))
            for key, score in zip(keys, scores, strict=True):
                if wrong_score(score) is None:
                    self._keep(key, asked[first[key]], float(score))
            return scores

        def take(keys: tuple[str, ...], scores: list[Any]) -> None:
            for key, score in zip(keys, scores, strict=True):
                if (wrong := wrong_score(score)) is None:
                    found[key] = float(score)
                else:
                    fail(key, f"{self.server.address} answered, and {wrong}")

        def unanswered(keys: tuple[str, ...], error: Unanswered) -> None:
            if not error.reached:
                raise error
            for key in keys:
                fail(key, error.problem)

        def fail(key: str, said: str) -> None:
            why[key] = said
            if last is not None:
                self.failures.stop_at(last, first[key], said, _WRONG_ANSWER)

        self.poster.send_all(jobs, read, take, unanswered)

    def _scores(self, response: httpx.Response, count: int) -> list[Any]:
        server = self.server
        try:
            scores = server.shape.scores(json.loads(response.text))
        except (ValueError, RecursionError):
            scores = None
        if not isinstance(scores, list):
            said = f"{server.address} gave no scores of format {server.format}{self.poster.said(response)}"
            raise UserError(server.where, said, _WRONG_ANSWER)
        if len(scores) != count:
            said = f"{server.address} gave {len(scores)} scores for {count} replies"
            raise UserError(server.where, said, _WRONG_ANSWER)
        return scores

    def _asked(self, replies: Replies, place: int) -> Asked:
        server, prompt, text = self.server, replies.prompts[place], replies.texts[place]
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        said = {"prompt_text": "", "query": ""}
        if server.shape.needs_text:
            said = self._as_text(replies, place)
        return Asked(prompt, completion, text, replies.row(place), server.column, **said)

    def _as_text(self, replies: Replies, place: int) -> dict[str, str]:
        if len(replies.prompt_ids) and self.tokenizer is not None:
            prompt, reply = list(replies.prompt_ids[place]), list(replies.reply_ids[place])
            return {
                "prompt_text": str(self.tokenizer.decode(prompt)),
                "query": str(self.tokenizer.decode([*prompt, *reply])),
            }
        prompt = replies.prompts[place]
        if not isinstance(prompt, str):
            said = f"format {self.server.format} tells prompts as text, and they are conversations without tokens"
            raise UserError(self.server.where, said, "use format: plain")
        return {"prompt_text": prompt, "query": prompt + replies.texts[place]}

    def _key(self, asked: Asked) -> str:
        """The hash of everything that shapes a score, and of nothing secret.

        Raises:
            UserError: a column cannot be sent.
        """
        try:
            body = json.dumps(self.server.shape.body([asked]), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            said = f"a column of the data cannot be sent as JSON ({error})"
            raise UserError(self.server.where, said, "take it out of the data, or use a function") from None
        return hashlib.sha256(f"{self.server.address}\n{self.server.format}\n{body}".encode()).hexdigest()

    def _kept(self, key: str) -> float | None:
        try:
            score = json.loads(self.answers.get(key) or "null")
        except ValueError:
            return None
        return float(score) if wrong_score(score) is None else None

    def _keep(self, key: str, asked: Asked, score: float) -> None:
        body = self.server.shape.body([asked])
        self.answers.put(key, {"url": self.server.address, "asked": body, "answer": json.dumps(score)})
