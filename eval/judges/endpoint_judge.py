"""Judges behind an OpenAI-compatible chat endpoint: a hosted model, or a server of one's own (vLLM, llama.cpp, ...).

    - kind: endpoint
      url: https://api.openai.com/v1       # what comes before /chat/completions
      model: gpt-4o-mini
      mode: pairwise                       # or score: one reply at a time, from 1 to 10
      criteria: how kind it is             # optional: what makes a reply better
      api_key_env: OPENAI_API_KEY          # the variable that holds the key; the key itself never stands in a recipe
      parameters: {temperature: 0, max_tokens: 512}     # fields of the request; null leaves one out
      concurrency: 8                       # requests at a time
      retries: 6                           # after 429, 5xx or a failed connection, waiting longer each time
      timeout: 120                         # seconds
      cache: FOLDER                        # kept answers; default: eval-cache in the run folder
      price_per_million: {input: 0.15, output: 0.6}     # tokens; the cost is then reported

Pairwise, every pair of policies is asked about every prompt twice, once in each order, so N prompts and P policies take
N P (P - 1) requests at most. An answer without a verdict is not kept: the next run asks again.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ...files import EVAL_CACHE
from ...models.adapters import AdapterSet
from ...progress import meter
from ...stages.scorers.endpoint_answers import Answers
from ...stages.scorers.endpoint_client import Client, Endpoint, Usage
from ...stages.scorers.endpoint_prompts import CRITERIA, comparison, rating, read_choice, read_rating, why_unread
from ...values import is_finite
from ..samples import Sample
from ..shared import is_first
from ..statistics.intervals import mean_se
from ..statistics.winrate import order_outcomes
from .judge import Judge, JudgePlan, PairJudge
from .names import judge_name

CACHE_FOLDER = EVAL_CACHE
_PARAMETERS = {"temperature": 0, "max_tokens": 512}
# Ours to say, or of no use to a judge that reads one whole answer.
_RESERVED = ("model", "messages", "stream", "n")
_KEY_ENV = "OPENAI_API_KEY"


@dataclass(frozen=True)
class _EndpointJudge:
    name: str
    client: Client
    criteria: str

    @property
    def usage(self) -> Usage:
        return self.client.usage


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
        return comparison(first.prompt.messages, first.completion, second.completion, self.criteria)


class ScoreEndpointJudge(_EndpointJudge):
    """A chat model that rates one reply at a time, from 1 to 10; nan where its rating could not be read."""

    def score(self, samples: Sequence[Sample]) -> list[float]:
        asked = [rating(sample.prompt.messages, sample.completion, self.criteria) for sample in samples]
        with meter(f"eval {self.name}: requests", len(asked)) as done:
            ratings = [read_rating(answer) for answer in self.client.ask(asked, done)]
        return [math.nan if each is None else each for each in ratings]


_MODES = {"pairwise": (PairwiseEndpointJudge, read_choice), "score": (ScoreEndpointJudge, read_rating)}


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry (see the module for its fields) and reads the key; no request is sent.

    Args:
        run_dir: where answers are kept unless the entry names a `cache`; without either they are kept in memory.

    Raises:
        UserError: a missing or malformed field, or a named variable that is not set.
    """
    model, mode, criteria = entry.get("model"), entry.get("mode", "pairwise"), entry.get("criteria", CRITERIA)
    if not isinstance(model, str) or not model:
        raise UserError(
            f"{where}.model", f"is {model!r}, expected the model's name at the endpoint", "write model: NAME"
        )
    if mode not in _MODES:
        raise UserError(f"{where}.mode", f"is {mode!r}, expected {' or '.join(_MODES)}", "correct the mode")
    if not isinstance(criteria, str) or not criteria:
        raise UserError(f"{where}.criteria", f"is {criteria!r}, expected text", "say what makes a reply better")
    key_env, key = _key(entry, where)
    endpoint = Endpoint(
        where=where,
        url=_url(entry, where),
        model=model,
        key_env=key_env,
        key=key,
        parameters=_parameters(entry, where),
        retries=int(_number(entry, "retries", 6, where, low=0, whole=True)),
        concurrency=int(_number(entry, "concurrency", 8, where, low=1, whole=True)),
        timeout=_number(entry, "timeout", 120.0, where, low=0.001),
        price=_price(entry, where),
    )
    name, folder = judge_name(entry), _cache_folder(entry, where, run_dir)

    def open_judge(adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase) -> Judge | PairJudge:
        del adapters, tokenizer
        kind, read = _MODES[mode]
        return kind(name, Client(endpoint, Answers(folder, where), partial(why_unread, read)), criteria)

    return JudgePlan(name, open_judge)


def _url(entry: dict[str, Any], where: str) -> str:
    url = entry.get("url")
    remedy = "write url: https://api.openai.com/v1, say"
    if not isinstance(url, str):
        raise UserError(f"{where}.url", f"is {url!r}, expected an address", remedy)
    try:
        parts = urlsplit(url)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        secret = good = False
    if secret:
        # Not shown: what stands there may be a secret.
        remedy = "leave out what stands before @ or after ?; a key goes into the environment (api_key_env)"
        raise UserError(f"{where}.url", "holds a user name, a password or a query", remedy)
    if not good:
        raise UserError(f"{where}.url", f"is {url!r}, expected http:// or https:// and a host", remedy)
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        raise UserError(f"{where}.url", f"is {url!r}, whose end we add", "leave out /chat/completions")
    return url


def _key(entry: dict[str, Any], where: str) -> tuple[str, str | None]:
    """(variable, its key); None where the variable is the default one and not set: servers at home take no key."""
    variable = entry.get("api_key_env", _KEY_ENV)
    # Lower-case letters are allowed in a variable's name, but then it could be a key that was written here by mistake.
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        remedy = f"write the variable's name, as {_KEY_ENV}, and never the key itself"
        raise UserError(f"{where}.api_key_env", "is no name of an environment variable in capitals", remedy)
    key = os.environ.get(variable, "").strip()
    if not key and "api_key_env" in entry and is_first():  # of several machines one may have it
        raise UserError(f"{where}.api_key_env", f"${variable} is not set", f"put the key into ${variable}")
    # Anything else could not stand in a header, or would come back in another spelling.
    if key and not re.fullmatch(r"[!#-\[\]-~]+", key):
        remedy = "put the key there, printable ASCII without spaces, quotes and backslashes"
        raise UserError(f"{where}.api_key_env", f"what ${variable} holds is no key", remedy)
    return variable, key or None


def _parameters(entry: dict[str, Any], where: str) -> dict[str, Any]:
    given = entry.get("parameters", {})
    if not isinstance(given, dict):
        raise UserError(f"{where}.parameters", f"is {given!r}, expected a mapping", "write {temperature: 0}, say")
    ours = next((key for key in given if key in _RESERVED), None)
    if ours is not None:
        raise UserError(f"{where}.parameters", f"{ours!r} cannot be set there", "leave it out")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}.parameters", f"cannot be sent ({error})", "write what JSON can hold") from None
    return {key: value for key, value in {**_PARAMETERS, **given}.items() if value is not None}


def _price(entry: dict[str, Any], where: str) -> tuple[float, float] | None:
    if "price_per_million" not in entry:
        return None
    place, price = f"{where}.price_per_million", entry["price_per_million"]
    if not isinstance(price, dict) or set(price) != {"input", "output"}:
        raise UserError(place, f"is {price!r}, expected input and output", "write {input: 0.15, output: 0.6}, say")
    return _number(price, "input", 0.0, place, low=0), _number(price, "output", 0.0, place, low=0)


def _cache_folder(entry: dict[str, Any], where: str, run_dir: Path | None) -> Path | None:
    if "cache" not in entry:
        return run_dir / CACHE_FOLDER if run_dir is not None else None
    named = entry["cache"]
    if not isinstance(named, str) or not named:
        raise UserError(f"{where}.cache", f"is {named!r}, expected a folder", "write cache: FOLDER, or leave it out")
    folder = Path(named).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{where}.cache", f"{named!r} is no folder", "write cache: FOLDER, or leave it out")
    return folder


def _number(entry: dict[str, Any], key: str, default: float, where: str, *, low: float, whole: bool = False) -> float:
    value = entry.get(key, default)
    if not is_finite(value) or (whole and not isinstance(value, int)) or value < low:
        wanted = f"a {'whole ' if whole else ''}number of at least {low:g}"
        raise UserError(f"{where}.{key}", f"is {value!r}, expected {wanted}", "correct it, or leave it out")
    return value
