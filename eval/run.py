"""The whole evaluation: samples of every policy, scored by every judge, with win-rates and KL."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..progress import say
from ..stages.scorers.endpoint_client import Metered
from ..values import plain
from .drawn import DrawnReplies
from .judges.judge import Judge, PairJudge, PlacingJudge, asked
from .judges.registry import plan_judges
from .judges.verdicts import COLUMNS, Verdicts, verdict_columns
from .kl import KL
from .overoptimisation import check_over_optimisation, over_optimisation
from .replies import measure_replies
from .results import Evaluation, ResultRow, write_evaluation
from .reward_models import measured_in_evaluation
from .samples import Sample
from .shared import is_first
from .spec import EvalSpec
from .statistics.over_seeds import over_seeds
from .tracked import tell_trackers
from .workbench import Workbench

__all__ = ["EvalSpec", "Evaluation", "evaluate", "run_eval"]


def run_eval(spec: EvalSpec, run_dir: Path | None = None) -> list[ResultRow]:
    """Evaluates and writes RUN/eval (see `results.write_evaluation`); of several processes the first one writes.

    Args:
        run_dir: the run folder; None: the spec's `output_dir`.

    Returns:
        The rows of results.json.

    Raises:
        UserError: for what the user can put right in policies, prompts or judges.
    """
    root = run_dir or spec.output_dir
    if root is None:
        raise ValueError("no run folder: give run_dir or the spec's output_dir")
    drawn = DrawnReplies(root, keeps=is_first())
    evaluation = evaluate(spec, root, drawn)
    if is_first():
        write_evaluation(root, evaluation, partial(tell_trackers, spec.trackers, evaluation))
    return evaluation.rows


def evaluate(spec: EvalSpec, run_dir: Path | None = None, drawn: DrawnReplies | None = None) -> Evaluation:
    """Samples, scores and measures without writing results; arguments and errors as in `run_eval`.

    Args:
        drawn: where replies are kept; None: those of earlier evaluations in the run folder are read, none are written.
    """
    plans = plan_judges(spec.judges, run_dir)
    check_over_optimisation(spec)
    bench = Workbench.open(spec, drawn or DrawnReplies(run_dir or spec.output_dir))
    try:
        return _evaluate(bench, [plan.open(bench.adapters, bench.tokenizer) for plan in plans])
    finally:
        bench.close()


def _evaluate(bench: Workbench, judges: Sequence[Judge | PairJudge]) -> Evaluation:
    spec, prompts = bench.spec, bench.prompts()
    samples = {policy: bench.samples(policy, prompts) for policy in bench.roles}
    bench.drawn.forget(but=[bench.drawn_key(policy, prompts) for policy in bench.roles])
    lengths = {policy: [len(reply.tokens) for reply in replies] for policy, replies in samples.items()}
    scores, outcomes, judged, extras = {}, {}, {}, {}
    for judge in judges:
        verdicts = Verdicts.of(judge, samples)
        extras[judge.name] = asked(judge, partial(_of_judge, judge))
        scores |= {(policy, judge.name): given for policy, given in verdicts.scores.items()}
        against = {ours: each for (ours, other), each in verdicts.outcomes.items() if other == spec.reference}
        outcomes |= {(policy, judge.name): given.tolist() for policy, given in against.items()}
        judged[judge.name] = verdict_columns(verdicts, lengths, spec.reference, spec.seed)
    kls = {policy: measure_kl(bench, replies) if spec.kl else None for policy, replies in samples.items()}
    rewards = measured_in_evaluation(bench)
    over = over_optimisation(bench, prompts, judges) if spec.over_optimisation is not None else None
    benchmarks = _benchmarks(bench)
    rows: list[ResultRow] = []
    for policy, replies in samples.items():
        for judge in [judge.name for judge in judges] or [None]:
            names = {"policy": policy, "reference": spec.reference, "judge": judge}
            # Without a judge: how many replies there are and nothing else.
            said = judged[judge][policy] if judge else dict.fromkeys(COLUMNS) | {"n": len(prompts)}
            how = {"temperature": spec.temperature, "seed": spec.seed}
            how |= {"beams": spec.beams} if spec.beams > 1 else {}
            how |= {} if spec.rollout is None else {"server": spec.rollout.rollout_engine}
            row = plain({**names, **said, **_reply_columns(replies, kls[policy]), **how, **extras.get(judge, {})})
            rows.append(row)
    return Evaluation(rows, samples, scores, outcomes, rewards, over, benchmarks, over_seeds(rows, spec.seed_groups))


def _benchmarks(bench: Workbench) -> dict[str, Any] | None:
    """The content of benchmarks.json, where the evaluation has any."""
    if bench.spec.benchmarks is None:
        return None
    from .harness.measure import measure_benchmarks

    return measure_benchmarks(bench, bench.spec.benchmarks)


def _of_judge(judge: Judge | PairJudge) -> dict[str, Any]:
    """What is true of a judge whoever is judged; said as well."""
    extra: dict[str, Any] = {}
    if isinstance(judge, Metered):
        extra["usage"] = asdict(judge.usage)
        say(f"eval {judge.name}: {judge.usage}")
    if isinstance(judge, PlacingJudge):
        extra["first_place"], extra["first_place_n"] = judge.first_place
        if extra["first_place_n"]:
            share, n = judge.first_place
            say(f"eval {judge.name}: the reply shown first won {share:.1%} of {n} verdicts; 50% favours no place")
    return extra


def measure_kl(bench: Workbench, replies: Sequence[Sample]) -> KL:
    """KL of the replies' policy to the evaluation's reference."""
    return bench.policy_kl(replies)


def _reply_columns(replies: Sequence[Sample], kl: KL | None) -> dict[str, Any]:
    """What is true of a policy's replies whoever judges them."""
    return measure_replies(replies) | {
        "kl": kl.per_sequence if kl else None,
        "kl_se": kl.per_sequence_se if kl else None,
        "kl_per_token": kl.per_token if kl else None,
    }
