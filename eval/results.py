"""What an evaluation found, and the files of RUN/eval that hold it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from ..files import (
    AGGREGATE,
    BENCHMARKS,
    EVALUATION,
    OVER_OPTIMISATION,
    RESULTS,
    REWARDS,
    SAMPLES,
    read_regular,
    whole_folder,
)
from ..stages.scorers.unread import unread_words
from ..values import plain
from .samples import Sample


class AgainstOther(TypedDict):
    """A policy's win-rate against one other policy, with its 95% interval, over n prompts."""

    win_rate: float
    ci_low: float
    ci_high: float
    n: int


class VerdictColumns(TypedDict):
    """What a judge says of a policy: rates are fractions of 1, ratings Bradley-Terry log-odds of mean 0.

    `against` is the policy's row of the matrix of all pairs, by the other policies' names. A number is nan where there
    is nothing to say, as of length control with few prompts.
    """

    n: int
    mean_score: float
    win_rate: float
    ci_low: float
    ci_high: float
    ties: int
    unparsable: int
    length_controlled_win_rate: float
    rating_log_odds: float
    rating_low: float
    rating_high: float
    against: dict[str, AgainstOther]


ResultRow = dict[str, Any]
"""A row of results.json, one policy under one judge: policy, reference and judge (None without any), `VerdictColumns`,
`replies.REPLY_COLUMNS` (lengths in tokens, KL in nats), temperature and seed; None where something was not measured.
`beams` is there only with beam search, `server` (vllm, sglang) where one drew the replies, `usage` only with a judge
that costs something: what judging all policies took
this time, answers kept from before being free (see `endpoint_client.Usage`); `first_place` and `first_place_n` only
with one that reads two replies at once: how often the reply shown first won, of so many verdicts."""


def unread_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Judge -> why some of its answers held no verdict -> how many; they are asked again on the next run."""
    found = {str(row.get("judge")): (row.get("usage") or {}).get("unread") for row in rows}
    return {judge: dict(unread) for judge, unread in found.items() if unread}


def silent_judges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The judges that gave no verdict on any policy but the reference."""
    heard: dict[str, bool] = {}
    for row in rows:
        if row.get("judge") and row["policy"] != row.get("reference"):
            heard[row["judge"]] = heard.get(row["judge"], False) or bool(row.get("n"))
    return [judge for judge, any_ in heard.items() if not any_]


def silence_words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each judge without a single verdict, with what is known of why."""
    unread = unread_answers(rows)
    return [
        f"judge {judge} gave no verdict at all"
        + (f": {unread_words(unread[judge])}" if judge in unread else "; none of its win-rates means anything")
        for judge in silent_judges(rows)
    ]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        rows: one per policy and judge, those of results.json.
        samples: policy -> its replies, one per prompt.
        scores: (policy, judge) -> one score per reply, of the judges that score.
        outcomes: (policy, judge) -> what each reply gets against the reference's: 1 win, 0.5 tie, 0 loss, or between;
            nan without a verdict. The reference itself is left out.
        reward_models: one mapping per reward model, the rows of rewards.json.
        over_optimisation: the content of overoptimisation.json (see `overoptimisation.py`).
        benchmarks: the content of benchmarks.json (see `harness/measure.py`).
        over_seeds: the rows of aggregate.json (see `statistics.over_seeds`).
    """

    rows: list[ResultRow]
    samples: dict[str, list[Sample]]
    scores: dict[tuple[str, str], list[float]]
    outcomes: dict[tuple[str, str], list[float]]
    reward_models: list[dict[str, Any]]
    over_optimisation: dict[str, Any] | None = None
    benchmarks: dict[str, Any] | None = None
    over_seeds: list[dict[str, Any]] = field(default_factory=list)


def kept_benchmarks(run_dir: Path) -> dict[str, Any] | None:
    """The content of benchmarks.json as it lies there; None where there is none that can be read."""
    try:
        found = json.loads(read_regular(run_dir / EVALUATION / BENCHMARKS))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_evaluation(run_dir: Path, evaluation: Evaluation, also: Callable[[Path], None] | None = None) -> None:
    """Writes RUN/eval: results.json, samples.jsonl; rewards.json where a reward model was measured, and
    overoptimisation.json and benchmarks.json where those were, aggregate.json where there are several seeds. The folder
    appears whole or not at all; benchmarks that were measured by themselves stay.

    Args:
        also: writes what else belongs into the folder, before it appears.
    """
    benchmarks = evaluation.benchmarks or kept_benchmarks(run_dir)
    with whole_folder(run_dir / EVALUATION) as folder:
        contents = {
            RESULTS: evaluation.rows,
            REWARDS: evaluation.reward_models or None,
            OVER_OPTIMISATION: evaluation.over_optimisation,
            AGGREGATE: evaluation.over_seeds or None,
            BENCHMARKS: benchmarks,
        }
        for name, content in contents.items():
            if content is not None:
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            for policy, replies in evaluation.samples.items():
                for place, reply in enumerate(replies):
                    judged = {
                        name: {judge: values[place] for (p, judge), values in table.items() if p == policy}
                        for name, table in (("scores", evaluation.scores), ("outcomes", evaluation.outcomes))
                    }
                    file.write(json.dumps(plain({**reply.as_dict(), **judged}), ensure_ascii=False) + "\n")
        if also is not None:
            also(folder)
