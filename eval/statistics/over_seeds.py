"""Results over seeds: the mean of stages that differ in their seed alone, with the t-interval of that mean.

An interval over prompts says how sure a number is of one trained policy; one over seeds says what training again would
give. Nothing here is of prompts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from ...values import is_finite

MEASURES = (
    *("mean_score", "win_rate", "length_controlled_win_rate", "rating_log_odds"),
    *("kl", "kl_per_token", "length", "eos_rate", "repetition"),
)
"""Of the columns of results.json, those that have a mean over seeds."""
_RATES = ("win_rate", "length_controlled_win_rate", "eos_rate")


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """(mean, standard deviation, lower end, upper end) of the mean of n >= 2 independent values.

    By Student's t with n - 1 degrees of freedom; the deviation has n - 1 below it too.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values, expected two or more: one has no spread")
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    reach = float(stats.t.ppf(0.5 + level / 2, n - 1)) * sd / math.sqrt(n)
    return mean, sd, mean - reach, mean + reach


def over_seeds(rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """A row for each group of policies and each judge.

    Args:
        rows: of results.json. groups: as of `seed_groups`.

    Returns:
        Mappings with over ("seeds"), policy (what the group's names share), policies, reference, judge, n (seeds), and
        of each measure that two or more of them have NAME, NAME_n, NAME_sd, NAME_low and NAME_high: its mean, over how
        many, its standard deviation over seeds, and the 95% interval of the mean; shares end at 0 and 1.
    """
    found = []
    for judge in dict.fromkeys(row.get("judge") for row in rows):
        judged = {row["policy"]: row for row in rows if row.get("judge") == judge}
        for names in groups:
            those = [judged[name] for name in names if name in judged]
            if len(those) < 2:
                continue
            row: dict[str, Any] = {"over": "seeds", "policy": shared_name(names)}
            row |= {"policies": [each["policy"] for each in those], "reference": those[0].get("reference")}
            row |= {"judge": judge, "n": len(those)}
            for measure in MEASURES:
                values = [float(each[measure]) for each in those if is_finite(each.get(measure))]
                if len(values) > 1:
                    mean, sd, low, high = t_interval(values)
                    if measure in _RATES:
                        low, high = max(low, 0.0), min(high, 1.0)
                    row |= {measure: mean, f"{measure}_n": len(values), f"{measure}_sd": sd}
                    row |= {f"{measure}_low": low, f"{measure}_high": high}
            found.append(row)
    return found


def shared_name(names: Sequence[str]) -> str:
    """dpo of dpo-seed0 and dpo-seed1; all names where they are not made like that."""
    stems = {name.rpartition("-seed")[0] for name in names if name.rpartition("-seed")[2].isdecimal()}
    made = len(stems) == 1 and all(name.rpartition("-seed")[2].isdecimal() for name in names)
    return stems.pop() if made else ", ".join(names)


def seed_groups(stages: Mapping[str, Any]) -> list[list[str]]:
    """The stages of a recipe that are the same but for their seeds and those of their parents, two or more each."""

    def same(name: str, above: tuple[str, ...] = ()) -> str:
        stage = stages.get(name)
        if not isinstance(stage, Mapping) or name in above:
            return name
        given = {key: value for key, value in stage.items() if key != "seed"}
        train = given.get("train")
        if isinstance(train, Mapping):
            given["train"] = {key: value for key, value in train.items() if key not in ("seed", "data_seed")}
        for key in ("from", "reward"):
            if isinstance(given.get(key), str):
                given[key] = same(given[key], (*above, name))
        if isinstance(given.get("reward"), list):
            given["reward"] = [
                {**each, "stage": same(str(each["stage"]), (*above, name))}
                if isinstance(each, Mapping) and "stage" in each
                else each
                for each in given["reward"]
            ]
        return json.dumps({"kind": stage.get("kind") or name, **given}, sort_keys=True, default=str)

    groups: dict[str, list[str]] = {}
    for name in stages:
        groups.setdefault(same(name), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
