"""The evaluation's results in trackers: one run of theirs, a number a policy and judge."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import EVALUATION, LOGS
from ..progress import say
from ..stages.job import Trackers
from ..stages.trackers import open_writer, writes
from ..values import is_finite
from .results import Evaluation

_JUDGED = (
    *("mean_score", "win_rate", "ci_low", "ci_high", "ties", "n", "length_controlled_win_rate"),
    *("rating_log_odds", "rating_low", "rating_high"),
)
_POLICY = ("kl", "kl_se", "kl_per_token", "length", "eos_rate", "repetition")


def result_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`POLICY/JUDGE/win_rate`, `POLICY/kl` and the like -> the number, of the rows of results.json; KL in nats."""
    values: dict[str, float] = {}
    for row in rows:
        judge = row.get("judge")
        judged = {f"{row['policy']}/{judge}/{key}": row.get(key) for key in _JUDGED} if judge else {}
        own = {f"{row['policy']}/{key}": row.get(key) for key in _POLICY}
        values |= {key: float(value) for key, value in {**own, **judged}.items() if is_finite(value)}
    return values


def tell_trackers(trackers: Trackers, evaluation: Evaluation, folder: Path) -> None:
    """Write the results to every tracker; one that refuses is said, and takes no result from anybody.

    Args:
        folder: the evaluation's, which gets TensorBoard's event files.
    """
    values = result_values(evaluation.rows)
    for name in trackers.names:
        if not writes(name):
            say(f"{EVALUATION}: {name} is told of stages alone: only tensorboard, trackio and wandb of results")
            continue
        try:
            identity = secrets.token_hex(4)
            writer = open_writer(name, folder / LOGS, trackers, EVALUATION, identity=identity, config={})
            writer.write(0, values)
            writer.close(failed=False)
        except (UserError, OSError, RuntimeError) as error:
            say(f"{EVALUATION}: {name} was not told: {error}")
