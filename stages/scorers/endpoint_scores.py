"""Scores from a chat model behind an OpenAI-compatible endpoint: it rates one reply at a time, from 1 to 10.

An answer without a rating is asked for once more.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError
from .endpoint_answers import Answers
from .endpoint_client import Client, Messages, Usage
from .endpoint_prompts import read_rating, why_unread
from .endpoint_settings import NoCriteria, Question, read_endpoint, read_question
from .posting import Unanswered
from .replies import Failures, Replies
from .servers import cache_folder

_REMEDY = "raise parameters.max_tokens, take a model that follows its instruction, or say on_failure"


class EndpointScorer:
    """A chat model as a source of scores."""

    def __init__(self, client: Client, question: Question, failures: Failures) -> None:
        self.client, self.question, self.failures = client, question, failures

    @classmethod
    def of(cls, entry: Mapping[str, Any], where: str, failures: Failures, run_dir: Path | None) -> "EndpointScorer":
        """From a recipe's entry (see `endpoint_settings`).

        Raises:
            UserError: a malformed field; or it is to compare two replies, and a reward scores one.
        """
        if entry.get("mode", "score") != "score":
            said = f"is {entry['mode']!r}, and a reward scores one reply"
            raise UserError(f"{where}.mode", said, "write mode: score, or leave it out")
        endpoint, question = read_endpoint(entry, where), read_question(entry, where)
        answers = Answers(cache_folder(entry, where, run_dir), where)
        return cls(Client(endpoint, answers, partial(why_unread, read_rating)), question, failures)

    @property
    def usage(self) -> Usage:
        return self.client.usage

    def __call__(self, replies: Replies) -> list[float]:
        why: dict[int, str] = {}
        asked: dict[int, Messages] = {}
        for place in range(len(replies)):
            try:
                asked[place] = self._question(replies, place)
            except NoCriteria as error:
                why[place] = str(error)
                self.failures.stop_at(replies, place, str(error), "name a column that every row has")
        found = self._ask(replies, asked, why)
        if again := {place: asked[place] for place in asked if place not in found and place not in why}:
            self.client.forget(list(again.values()))
            found |= self._ask(replies, again, why)
            why |= dict.fromkeys((place for place in again if place not in found and place not in why), self._silence())
        # what was answered is on disk; without a folder it is kept here
        if self.client.answers.folder is not None:
            self.client.forget()
        return self.failures.settled(replies, [found.get(place) for place in range(len(replies))], why, _REMEDY)

    def _ask(self, replies: Replies, asked: Mapping[int, Messages], why: dict[int, str]) -> dict[int, float]:
        """The ratings by place; requests that failed go into `why`."""
        places = {self.client.endpoint.key_of(messages): place for place, messages in asked.items()}
        failed: dict[str, str] = {}

        def unanswered(key: str, error: Unanswered) -> None:
            if not error.reached:
                raise error
            failed[key] = error.problem
            self.failures.stop_at(replies, places[key], error.problem, error.remedy)

        answers = self.client.ask(list(asked.values()), on_unanswered=unanswered)
        keys = {place: self.client.endpoint.key_of(messages) for place, messages in asked.items()}
        why |= {place: failed[key] for place, key in keys.items() if key in failed}
        ratings = {place: read_rating(answer) for place, answer in zip(asked, answers, strict=True)}
        return {place: each for place, each in ratings.items() if each is not None}

    def _question(self, replies: Replies, place: int) -> Messages:
        prompt = replies.prompts[place]
        conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.question.rating(conversation, replies.texts[place], replies.row(place))

    def _silence(self) -> str:
        unread = ", ".join(self.client.usage.unread) or "unreadable"
        return f"{self.client.endpoint.address} gave no rating, asked twice ({unread})"
