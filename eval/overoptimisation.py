"""Over-optimisation measured: proxy and gold judge along a PPO run and with best of n, against sqrt(KL).

Both ways start from the policy that PPO started from, on the same prompts. PPO's policies are those that the run kept
(`keep_every`) and its last one, one reply per prompt; their KL to the start is measured. For best of n the start
answers each prompt N times and the proxy picks; the start's own point is the mean of all these replies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import ADAPTER_WEIGHTS, LINEAGE, METRICS
from ..intact import read_json_object
from ..models.lineage import adapter_sha256, read_lineage
from ..progress import say
from ..stages.ppo.files import POLICIES, kept_policies
from ..values import plain
from .judges.judge import Judge, PairJudge, asked
from .judges.names import judge_name, scoring_judges
from .judges.registry import plan_judges
from .samples import EncodedPrompt, Sample
from .spec import BASE, EvalSpec, OverOptimisation
from .statistics.intervals import mean_se
from .statistics.overoptimisation import BEST_OF_N, RL, Form, best_of, best_of_kl, counts, fit_gain
from .workbench import Workbench

SIDES = ("proxy", "gold")
_START, _WHAT = "start", "over-optimisation samples"


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes:
        place: {"step": N} or {"n": N}.
        kl, kl_se: nats per reply; the error is None for a bound.
        scores: side -> [P] one score per prompt, nan without one.
    """

    label: str
    place: dict[str, int]
    kl: float
    kl_se: float | None
    scores: dict[str, np.ndarray]


def eval_over_optimisation(spec: EvalSpec, run_dir: Path) -> dict[str, Any]:
    """The measurement alone, with the judges that it needs; writes nothing. Arguments as in `run.evaluate`."""
    wanted = spec.over_optimisation
    if wanted is None:
        raise ValueError("the spec has no over_optimisation")
    check_over_optimisation(spec)
    named = tuple(judge for judge in spec.judges if judge_name(judge) in (wanted.gold, wanted.proxy))
    plans = plan_judges(named, run_dir)
    bench = Workbench.open(replace(spec, policies={}, reference=BASE, reward_models=()))
    judges = [plan.open(bench.adapters, bench.tokenizer) for plan in plans]
    return over_optimisation(bench, bench.prompts(), judges)


def over_optimisation(
    bench: Workbench,
    prompts: Sequence[EncodedPrompt],
    judges: Sequence[Judge | PairJudge],
) -> dict[str, Any]:
    """The content of overoptimisation.json.

    Args:
        bench: of a spec that passed `check_over_optimisation`.
        prompts: the evaluation's; the first so many as are wanted are used, less those where a judge has no score.
        judges: open ones, the two wanted among them.

    Returns:
        proxy, gold, prompts, start, methods: [{method, kl_is, points, fit, peak}]. A point has label, step or n, kl,
        kl_se, and mean and standard error of proxy and gold in the judges' units. A fit has its form, and for each side
        alpha, beta, their standard errors, the peak (a d within the measured range, or None) and the number of points.
        `kl_is` says what the KL is, `peak` whether the gold judge's gain peaks.

    Raises:
        UserError: an adapter that cannot be loaded, or no prompt with all its scores.
    """
    wanted = bench.spec.over_optimisation
    assert wanted is not None
    sides = {side: _scorer(judges, getattr(wanted, side)) for side in SIDES}
    ours = list(prompts[: wanted.prompts])
    with bench.holding(wanted.start) as start:
        replies = bench.replies(start, _START, [prompt for prompt in ours for _ in range(wanted.best_of)], _WHAT)
        many = {side: scores.reshape(len(ours), -1) for side, scores in _scores(sides, replies).items()}
        mean = {side: scores_PN.mean(1) for side, scores_PN in many.items()}
        path = [Point("step 0", {"step": 0}, 0.0, 0.0, mean), *_path(bench, wanted, ours, sides, start)]
    judged = ~np.isnan([each for point in path for each in point.scores.values()]).any(0)
    if not judged.any():
        raise UserError("eval.over_optimisation", "no prompt has a score of both judges", "look at the judges")
    if not judged.all():
        say(f"eval over-optimisation: {np.count_nonzero(~judged)} prompts left out, where a judge has no score")
    path = [replace(each, scores={side: scores[judged] for side, scores in each.scores.items()}) for each in path]
    many = {side: scores_PN[judged] for side, scores_PN in many.items()}
    best = [
        Point(
            f"n = {n}", {"n": n}, best_of_kl(n), None, {side: best_of(many["proxy"], many[side], n) for side in SIDES}
        )
        for n in counts(wanted.best_of)
    ]
    content = {
        "proxy": wanted.proxy,
        "gold": wanted.gold,
        "prompts": int(np.count_nonzero(judged)),
        "start": BASE if wanted.start is None else wanted.start.name,
        "methods": [
            _method(wanted.stage, path, RL, "measured on the policy's own replies"),
            _method("best_of_n", best, BEST_OF_N, "log n - (n - 1) / n, an upper bound (arXiv 2401.01879)"),
        ],
    }
    return plain(content)


def check_over_optimisation(spec: EvalSpec) -> None:
    """Whether it can be measured, before anything is loaded; nothing where the spec does not ask for it.

    Raises:
        UserError: a judge that is not there or only compares, no finished PPO stage, or one that was not trained from
            the start that is there.
    """
    wanted = spec.over_optimisation
    if wanted is None:
        return
    scoring = scoring_judges(spec.judges)
    for side in SIDES:
        if (name := getattr(wanted, side)) not in scoring:
            said, known = f"no judge that scores is called {name!r}", ", ".join(scoring)
            raise UserError(f"eval.over_optimisation.{side}", said, f"known: {known}" if known else "add one")
    if wanted.gold == wanted.proxy:
        said = f"{wanted.gold!r} is the proxy as well"
        raise UserError("eval.over_optimisation.gold", said, "name a judge that the policy is not trained on")
    _last_step(wanted.folder)
    # the start is the adapter that the stage's lineage names first, where both have one
    lineage, start = wanted.folder / LINEAGE, wanted.start
    if start is None or not lineage.is_file() or not (start / ADAPTER_WEIGHTS).is_file():
        return
    parents = read_lineage(wanted.folder).parents
    if parents and parents[0]["sha256"] != adapter_sha256(start):
        said = f"was trained from another adapter than the {start.name} that is there now"
        raise UserError(str(wanted.folder), said, f"train {wanted.stage} again, or leave eval.over_optimisation out")


def _scorer(judges: Sequence[Judge | PairJudge], name: str) -> Judge:
    return next(each for each in judges if each.name == name and not isinstance(each, PairJudge))


def _path(
    bench: Workbench,
    wanted: OverOptimisation,
    prompts: list[EncodedPrompt],
    sides: Mapping[str, Judge],
    start: str | None,
) -> list[Point]:
    """PPO's kept policies and its last one, each on the base for as long as it is asked."""
    last = _last_step(wanted.folder)
    places = {f"step {step}": (step, place) for step, place in kept_policies(wanted.folder / POLICIES).items()}
    places |= {f"step {last}": (last, wanted.folder)}
    points = []
    for label, (step, folder) in places.items():
        with bench.holding(folder) as role:
            name = f"{wanted.stage} {label}"
            replies = bench.replies(role, name, prompts, _WHAT)
            kl = bench.kl(role, start, replies, f"{name}: KL to the start")
        points.append(Point(label, {"step": step}, kl.per_sequence, kl.per_sequence_se, _scores(sides, replies)))
    return points


def _last_step(folder: Path) -> int:
    """The optimiser steps of a finished stage, from its metrics.json."""
    file = folder / METRICS
    steps = read_json_object(file).get("steps")
    if not isinstance(steps, int):
        raise UserError(str(folder), f"holds no finished PPO stage ({METRICS} with its steps)", "train it first")
    return steps


def _scores(sides: Mapping[str, Judge], replies: list[Sample]) -> dict[str, np.ndarray]:
    given = {side: asked(judge, partial(judge.score, replies)) for side, judge in sides.items()}
    return {side: np.asarray(scores, dtype=np.float64) for side, scores in given.items()}


def _method(name: str, points: list[Point], form: Form, kl_is: str) -> dict[str, Any]:
    fits = {side: _fit(points, side, form) for side in SIDES}
    return {
        "method": name,
        "kl_is": kl_is,
        "points": [_as_dict(point) for point in points],
        "fit": {"form": form, **fits} if any(fits.values()) else None,
        "peak": _peak_words(fits["gold"], max(point.kl for point in points)),
    }


def _peak_words(fit: dict[str, Any] | None, furthest: float) -> str:
    """Of the gold judge's gain; `furthest` is the largest KL measured."""
    if fit is None:
        return "gold: nothing fitted, fewer than 3 points off zero"
    if fit["peak"] is None:
        return f"gold: no peak was seen up to KL {furthest:.3g}"
    return f"gold: highest at KL {fit['peak'] ** 2:.3g} (d = {fit['peak']:.3g})"


def _fit(points: list[Point], side: str, form: Form) -> dict[str, Any] | None:
    """Of the gains over the first point, prompt by prompt."""
    gain_PM = np.stack([point.scores[side] - points[0].scores[side] for point in points], axis=1)
    prompts = len(gain_PM)
    covariance_MM = np.cov(gain_PM, rowvar=False) / prompts if prompts > 1 else np.zeros((len(points), len(points)))
    fit = fit_gain(form, [max(point.kl, 0.0) ** 0.5 for point in points], gain_PM.mean(0).tolist(), covariance_MM)
    if fit is None:
        return None
    # one prompt has no spread, and so no error
    return asdict(fit) if prompts > 1 else asdict(fit) | {"alpha_se": None, "beta_se": None}


def _as_dict(point: Point) -> dict[str, Any]:
    row: dict[str, Any] = {"label": point.label, **point.place, "kl": point.kl, "kl_se": point.kl_se}
    for side in SIDES:
        row[side], row[f"{side}_se"] = mean_se(point.scores[side].tolist())
    return row
