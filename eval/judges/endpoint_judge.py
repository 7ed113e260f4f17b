"""Judges behind an OpenAI-compatible chat endpoint: a hosted model, or a server of one's own (vLLM, llama.cpp, ...).

    - kind: endpoint
      mode: pairwise                       # or score: one reply at a time, from 1 to 10
      ...                                  # see `stages/scorers/endpoint_settings.py`

Pairwise, every pair of policies is asked about every prompt twice, once in each order, so N prompts and P policies take
N P (P - 1) requests at most. An answer without a verdict is not kept: the next run asks again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ...files import EVAL_CACHE
from ...models.adapters import AdapterSet
from ...progress import meter
from ...stages.scorers.endpoint_answers import Answers
from ...stages.scorers.endpoint_client import Client, Messages, Usage
from ...stages.scorers.endpoint_prompts import read_choice, read_rating, why_unread
from ...stages.scorers.endpoint_settings import NoCriteria, Question, read_endpoint, read_question
from ...stages.scorers.servers import cache_folder
from ..samples import Sample
from ..shared import is_first
from ..statistics.intervals import mean_se
from ..statistics.winrate import order_outcomes
from .judge import Judge, JudgePlan, PairJudge
from .names import judge_name

CACHE_FOLDER = EVAL_CACHE


@dataclass(frozen=True)
class _EndpointJudge:
    name: str
    client: Client
    question: Question

    @property
    def usage(self) -> Usage:
        return self.client.usage

    def _refused(self, sample: Sample, error: NoCriteria) -> UserError:
        """A prompt without the column that says what counts."""
        said = f"prompt {sample.prompt_index + 1}: {error}"
        return UserError(self.client.endpoint.where, said, "name a column that every prompt has")


@dataclass(frozen=True)
class PairwiseEndpointJudge(_EndpointJudge):
    """A chat model that reads two replies at once, in both orders.

    Attributes:
        firsts: question -> the preference for the reply that was shown first.
    """

    firsts: dict[str, float] = field(default_factory=dict)

    @property
    def first_place(self) -> tuple[float, int]:
        """(how often the first place won, a tie being one half; verdicts); 0.5 favours neither, as every pair is shown
        in both orders. nan without a verdict."""
        return mean_se(list(self.firsts.values()))[0], len(self.firsts)

    def compare(self, policy: Sequence[Sample], other: Sequence[Sample]) -> list[float]:
        """The policy's outcome on each prompt, in [0, 1]; nan where either order's verdict could not be read.

        Equal replies are a tie, and nobody is asked.
        """
        pairs = list(zip(policy, other, strict=True))
        places = [place for place, (ours, theirs) in enumerate(pairs) if ours.completion != theirs.completion]
        asked = [pairs[place] for place in places]
        policy_first = [self._question(ours, theirs) for ours, theirs in asked]
        other_first = [self._question(theirs, ours) for ours, theirs in asked]
        questions = [*policy_first, *other_first]
        with meter(f"eval {self.name}: requests", 2 * len(asked)) as done:
            verdicts = [read_choice(answer) for answer in self.client.ask(questions, done)]
        for question, verdict in zip(questions, verdicts, strict=True):
            if verdict is not None:
                self.firsts[self.client.endpoint.key_of(question)] = verdict
        outcomes = np.full(len(pairs), 0.5)
        outcomes[places] = order_outcomes(verdicts[: len(asked)], verdicts[len(asked) :])
        return outcomes.tolist()

    def _question(self, first: Sample, second: Sample) -> list[dict[str, str]]:
        prompt = first.prompt
        try:
            return self.question.comparison(prompt.messages, first.completion, second.completion, prompt.columns)
        except NoCriteria as error:
            raise self._refused(first, error) from None


class ScoreEndpointJudge(_EndpointJudge):
    """A chat model that rates one reply at a time, from 1 to 10; nan where its rating could not be read."""

    def score(self, samples: Sequence[Sample]) -> list[float]:
        asked = [self._question(sample) for sample in samples]
        with meter(f"eval {self.name}: requests", len(asked)) as done:
            ratings = [read_rating(answer) for answer in self.client.ask(asked, done)]
        return [math.nan if each is None else each for each in ratings]

    def _question(self, sample: Sample) -> Messages:
        try:
            return self.question.rating(sample.prompt.messages, sample.completion, sample.prompt.columns)
        except NoCriteria as error:
            raise self._refused(sample, error) from None


_MODES = {"pairwise": (PairwiseEndpointJudge, read_choice), "score": (ScoreEndpointJudge, read_rating)}


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry and reads the key; no request is sent.

    Args:
        run_dir: where answers are kept unless the entry names a `cache`; without either they are kept in memory.

    Raises:
        UserError: a missing or malformed field, or a named variable that is not set.
    """
    mode = entry.get("mode", "pairwise")
    if mode not in _MODES:
        raise UserError(f"{where}.mode", f"is {mode!r}, expected {' or '.join(_MODES)}", "correct the mode")
    # of several machines one may have the key
    endpoint, question = read_endpoint(entry, where, key_needed=is_first()), read_question(entry, where)
    name, folder = judge_name(entry), cache_folder(entry, where, run_dir)

    def open_judge(adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase) -> Judge | PairJudge:
        del adapters, tokenizer
        kind, read = _MODES[mode]
        return kind(name, Client(endpoint, Answers(folder, where), partial(why_unread, read)), question)

    return JudgePlan(name, open_judge)
