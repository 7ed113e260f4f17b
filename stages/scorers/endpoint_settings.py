"""What a recipe says of an OpenAI-compatible chat endpoint, and of what it is asked.

      url: https://api.openai.com/v1       # what comes before /chat/completions
      model: gpt-4o-mini
      criteria: how kind it is             # what makes a reply better; or
      criteria_column: rubric              # the data's column that says it, row by row; or
      prompt: judge.txt                    # text, or a file with it, in place of our words; {column} is the row's
      api_key_env: OPENAI_API_KEY          # the variable that holds the key; the key itself never stands in a recipe
      parameters: {temperature: 0, max_tokens: 512}     # fields of the request; null leaves one out
      concurrency: 8                       # requests at a time
      retries: 6                           # after 429, 5xx or a failed connection, waiting longer each time
      timeout: 120                         # seconds
      cache: FOLDER                        # kept answers; default: eval-cache in the run folder; false: none are
      price_per_million: {input: 0.15, output: 0.6}     # tokens; the cost is then reported

The form of the verdict stays ours whatever `prompt` says, so that it can be read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from .endpoint_client import Endpoint, Messages
from .endpoint_prompts import CRITERIA, comparison, harmless, rating
from .replies import filled_in
from .servers import address, key_of, number

_PARAMETERS = {"temperature": 0, "max_tokens": 512}
# Ours to say, or of no use to a judge that reads one whole answer.
_RESERVED = ("model", "messages", "stream", "n")


class NoCriteria(Exception):
    """A row of the data does not say what makes a reply better."""


@dataclass(frozen=True)
class Question:
    """What an endpoint is asked about replies.

    criteria: what makes a reply better. column: the data's column that says it instead. prompt: the instruction in
    place of ours, with `{column}` for the row's columns.
    """

    criteria: str = CRITERIA
    column: str | None = None
    prompt: str | None = None

    def rating(self, conversation: Sequence[Mapping[str, Any]], reply: str, row: Mapping[str, object]) -> Messages:
        """How good one reply is. Raises NoCriteria where the row does not say what makes one better."""
        return rating(conversation, reply, self._of(row), self._instruction(row))

    def comparison(
        self, conversation: Sequence[Mapping[str, Any]], first: str, second: str, row: Mapping[str, object]
    ) -> Messages:
        """Which of two replies is better. Raises NoCriteria where the row does not say what makes one better."""
        return comparison(conversation, first, second, self._of(row), self._instruction(row))

    def _of(self, row: Mapping[str, object]) -> str:
        if self.column is None:
            return self.criteria
        said = row.get(self.column)
        if not isinstance(said, str | list) or not said:
            raise NoCriteria(f"its row has no {self.column!r}")
        return harmless(said if isinstance(said, str) else "; ".join(map(str, said)))

    def _instruction(self, row: Mapping[str, object]) -> str | None:
        return None if self.prompt is None else filled_in(self.prompt, row, harmless)


def read_question(entry: Mapping[str, Any], where: str) -> Question:
    """`criteria`, `criteria_column` or `prompt`.

    Raises:
        UserError: more than one of them, or no text.
    """
    given = [key for key in ("criteria", "criteria_column", "prompt") if entry.get(key) is not None]
    if len(given) > 1:
        raise UserError(f"{where}.{given[1]}", f"stands beside {given[0]}", "keep one of them")
    for key in given:
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise UserError(f"{where}.{key}", f"is {entry[key]!r}, expected text", "say what makes a reply better")
    return Question(entry.get("criteria") or CRITERIA, entry.get("criteria_column"), entry.get("prompt"))


def read_endpoint(entry: Mapping[str, Any], where: str, *, key_needed: bool = True) -> Endpoint:
    """The endpoint that an entry names, its key read from the environment; no request is sent.

    Raises:
        UserError: a missing or malformed field, or a named variable that is not set.
    """
    model = entry.get("model")
    if not isinstance(model, str) or not model:
        raise UserError(
            f"{where}.model", f"is {model!r}, expected the model's name at the endpoint", "write model: NAME"
        )
    url = address(entry, where, "write url: https://api.openai.com/v1, say")
    if url.endswith("/chat/completions"):
        raise UserError(f"{where}.url", f"is {url!r}, whose end we add", "leave out /chat/completions")
    key_env, key = key_of(entry, where, needed=key_needed)
    return Endpoint(
        where=where,
        url=url,
        model=model,
        key_env=key_env,
        key=key,
        parameters=_parameters(entry, where),
        retries=int(number(entry, "retries", 6, where, low=0, whole=True)),
        concurrency=int(number(entry, "concurrency", 8, where, low=1, whole=True)),
        timeout=number(entry, "timeout", 120.0, where, low=0.001),
        price=_price(entry, where),
    )


def _parameters(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
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


def _price(entry: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    if "price_per_million" not in entry:
        return None
    place, price = f"{where}.price_per_million", entry["price_per_million"]
    if not isinstance(price, dict) or set(price) != {"input", "output"}:
        raise UserError(place, f"is {price!r}, expected input and output", "write {input: 0.15, output: 0.6}, say")
    return number(price, "input", 0.0, place, low=0), number(price, "output", 0.0, place, low=0)
