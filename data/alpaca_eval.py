"""AlpacaEval's annotations: `instruction`, `output_1`, `output_2`, `generator_1`, `generator_2`, `preference`.

The first generator is the baseline. A preference of 2 says that the second output is better, 1 that the first is,
anything between how sure that is; 0 was a tie in older versions; null (or NaN) is an annotator without a verdict.
"""

from ..errors import UserError
from ..values import is_number
from .compared import ComparedFormat, Comparison, has_fields, read_name, said_nothing
from .rows import Message, RawRow, text_message

_OUTPUTS = frozenset({"output_1", "output_2", "preference"})
_NAMES = frozenset({"generator_1", "generator_2", "preference"})


def read_alpaca_eval(raw: RawRow, origin: str) -> Comparison:
    """One annotation.

    Raises:
        UserError: the preference is no number of 0 or 1 to 2, or an output is not text.
    """
    question = "\n\n".join(
        raw[name] for name in ("instruction", "input") if isinstance(raw.get(name), str) and raw[name]
    )
    return Comparison(
        prompt=question or origin,
        models=(read_name(raw, "generator_1", origin), read_name(raw, "generator_2", origin)),
        preference=_preference(raw["preference"], origin),
        talks=_talks(raw, question, origin),
    )


def _preference(value: object, origin: str) -> float | None:
    if said_nothing(value):
        return None
    try:
        number = float(value) if isinstance(value, str) else value  # cells of a CSV file
    except ValueError:
        number = None
    if number == 0 and is_number(number):
        return 0.5
    if not is_number(number) or not 1 <= number <= 2:
        remedy = "2 says that output_2 is better, 1 that output_1 is, 1.5 or 0 neither, null that there is no verdict"
        raise UserError(origin, f"preference is {value!r}, expected a number from 1 to 2", remedy)
    return float(number) - 1.0


def _talks(raw: RawRow, question: str, origin: str) -> tuple[list[Message], list[Message]] | None:
    outputs = [raw.get("output_1"), raw.get("output_2")]
    if any(output is None for output in outputs):
        return None
    for output in outputs:
        if not isinstance(output, str):
            raise UserError(origin, f"an output is {output!r}, expected text", "correct the row")
    first, second = ([text_message("user", question), text_message("assistant", str(each))] for each in outputs)
    return first, second


ALPACA_EVAL = ComparedFormat(
    "AlpacaEval",
    has_fields(_OUTPUTS, _NAMES),
    read_alpaca_eval,
    _OUTPUTS | {"instruction", "input"},
    baseline_first=True,
)
