"""From what a recipe says of a source to what scores replies: sources that read texts and the data's columns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..reward_functions import RewardFunction, call_reward_function, check_signature, import_function
from .endpoint_scores import EndpointScorer
from .http_scores import HttpScorer
from .replies import Failures, OnFailure, Replies, TextScorer
from .rubric import Rubric, parse_rubric
from .verifiers import VerifierScorer, parse_verifier


@dataclass(frozen=True)
class RubricScorer:
    """The share of a rubric's checks that the reply passes, in [0, 1]."""

    rubric: Rubric

    def __call__(self, replies: Replies) -> list[float]:
        return [self.rubric.score(text) for text in replies.texts]


@dataclass(frozen=True)
class FunctionScorer:
    """A Python function with TRL's signature: f(prompts, completions, **columns) -> list[float | None]."""

    function: RewardFunction
    where: str
    failures: Failures

    def __call__(self, replies: Replies) -> list[float]:
        why: dict[int, str] = {}
        scores = call_reward_function(
            self.function,
            where=self.where,
            prompts=replies.prompts,
            completions=replies.completions(),
            completion_ids=replies.reply_ids,
            columns=replies.columns,
            failed=None if self.failures.on_failure == "stop" else why,
        )
        return self.failures.settled(replies, scores, why, "correct the function")


@dataclass(frozen=True)
class Opening:
    """What the opening of a source takes.

    Attributes:
        settings: the fields of its kind, as a recipe has them.
        where: its place, for errors.
        on_failure: what becomes of a reply that it fails to score.
        tokenizer: the policy's. run_dir: in whose folder answers of servers are kept; None: they are not.
    """

    settings: Mapping[str, Any]
    where: str
    on_failure: OnFailure = "stop"
    tokenizer: PreTrainedTokenizerBase | None = None
    run_dir: Path | None = None

    @property
    def failures(self) -> Failures:
        return Failures(self.where, self.on_failure)


def _rubric(given: Opening) -> TextScorer:
    return RubricScorer(parse_rubric(given.settings.get("checks"), given.where))


def _verifier(given: Opening) -> TextScorer:
    return VerifierScorer(parse_verifier(given.settings, given.where), given.failures)


def _function(given: Opening) -> TextScorer:
    target = given.settings.get("function")
    return FunctionScorer(
        target if callable(target) else import_function(str(target or ""), given.where), given.where, given.failures
    )


def _endpoint(given: Opening) -> TextScorer:
    return EndpointScorer.of(given.settings, given.where, given.failures, given.run_dir)


def _http(given: Opening) -> TextScorer:
    return HttpScorer.of(given.settings, given.where, given.failures, given.tokenizer, given.run_dir)


OPENERS: Mapping[str, Callable[[Opening], TextScorer]] = {
    "rubric": _rubric,
    "verifier": _verifier,
    "function": _function,
    "endpoint": _endpoint,
    "http": _http,
}
"""The kinds of sources that need no model of ours -> what opens one; nothing is asked of a server yet."""


def check_source(kind: str, given: Opening) -> None:
    """Open a source to see that it can be, and try what takes longer.

    Raises:
        UserError: whatever is wrong with what the recipe says of it.
    """
    scorer = OPENERS[kind](given)
    if isinstance(scorer, RubricScorer):
        scorer.rubric.try_out()
    elif isinstance(scorer, VerifierScorer):
        scorer.verifier.try_out()
    elif isinstance(scorer, FunctionScorer):
        check_signature(scorer.function, given.where)
