"""The whole evaluation: samples of every policy, scored by every judge, with win-rates and KL."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import EVALUATION, OVER_OPTIMISATION, RESULTS, REWARDS, SAMPLES, whole_folder
from ..progress import say
from ..values import plain
from .judges.endpoint_client import Metered
from .judges.registry import plan_judges
from .judges.verdicts import COLUMNS, Verdicts, verdict_columns
from .kl import KL
from .overoptimisation import check_over_optimisation, over_optimisation
from .replies import measure_replies
from .reward_models import measured_in_evaluation
from .samples import Sample
from .spec import EvalSpec
from .workbench import Workbench

__all__ = ["EvalSpec", "Evaluation", "evaluate", "run_eval"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        rows: one mapping per policy x judge, the rows of results.json.
        samples: policy -> its replies, one a prompt.
        scores: (policy, judge) -> one score per reply, of the judges that score.
        outcomes: (policy, judge) -> what each reply gets against the reference's: 1 win, 0.5 tie, 0 loss, or between;
            nan without a verdict. The reference itself is left out.
        reward_models: one mapping per reward model, the rows of rewards.json.
        over_optimisation: the content of overoptimisation.json (see `overoptimisation_run`).
    """

    rows: list[dict[str, Any]]
    samples: dict[str, list[Sample]]
    scores: dict[tuple[str, str], list[float]]
    outcomes: dict[tuple[str, str], list[float]]
    reward_models: list[dict[str, Any]]
    over_optimisation: dict[str, Any] | None = None


def run_eval(spec: EvalSpec, run_dir: Path | None = None) -> list[dict[str, Any]]:
    """Evaluates and writes RUN/eval: results.json, samples.jsonl; rewards.json where a reward model is measured, and
    overoptimisation.json where the spec asks for it.

    The folder appears whole or not at all.

    Args:
        run_dir: the run folder; None: the spec's `output_dir`.

    Returns:
        The rows of results.json: policy, reference, judge, n, mean_score, win_rate, ci_low, ci_high, ties, unparsable,
        length_controlled_win_rate, rating_log_odds, rating_low, rating_high, against, length, length_se, eos_rate,
        eos_rate_se, repetition, repetition_se, kl, kl_se, kl_per_token, temperature, seed, and beams where there are
        several. Rates are fractions of 1, lengths tokens, KL nats, ratings Bradley-Terry log-odds of mean 0; `against`
        is the policy's row of the matrix of all pairs, `repetition` is that of `replies.py`. None where something was
        not measured, as length control with few prompts. The rows of a judge that costs something have `usage`
        besides: what judging all policies took this time, answers kept from before being free (see `endpoint.Usage`).

    Raises:
        UserError: for what the user can put right in policies, prompts or judges.
    """
    root = run_dir or spec.output_dir
    if root is None:
        raise ValueError("no run folder: give run_dir or the spec's output_dir")
    evaluation = evaluate(spec, root)
    _write(root / EVALUATION, evaluation)
    return evaluation.rows


def evaluate(spec: EvalSpec, run_dir: Path | None = None) -> Evaluation:
    """Samples, scores and measures without writing anything; arguments and errors as in `run_eval`."""
    plans = plan_judges(spec.judges, run_dir)
    check_over_optimisation(spec)
    bench = Workbench.open(spec)
    judges = [plan.open(bench.adapters, bench.tokenizer) for plan in plans]
    prompts = bench.prompts()
    samples = {policy: bench.samples(policy, prompts) for policy in bench.roles}
    lengths = {policy: [len(reply.tokens) for reply in replies] for policy, replies in samples.items()}
    scores, outcomes, judged, usages = {}, {}, {}, {}
    for judge in judges:
        verdicts = Verdicts.of(judge, samples)
        if isinstance(judge, Metered):
            usages[judge.name] = {"usage": asdict(judge.usage)}
            say(f"eval {judge.name}: {judge.usage}")
        scores |= {(policy, judge.name): given for policy, given in verdicts.scores.items()}
        against = {ours: each for (ours, other), each in verdicts.outcomes.items() if other == spec.reference}
        outcomes |= {(policy, judge.name): given.tolist() for policy, given in against.items()}
        judged[judge.name] = verdict_columns(verdicts, lengths, spec.reference, spec.seed)
    kls = {policy: measure_kl(bench, replies) if spec.kl else None for policy, replies in samples.items()}
    rewards = measured_in_evaluation(bench)
    over = over_optimisation(bench, prompts, judges) if spec.over_optimisation is not None else None
    rows = []
    for policy, replies in samples.items():
        for judge in [judge.name for judge in judges] or [None]:
            names = {"policy": policy, "reference": spec.reference, "judge": judge}
            # Without a judge: how many replies there are and nothing else.
            said = judged[judge][policy] if judge else dict.fromkeys(COLUMNS) | {"n": len(prompts)}
            drawn = {"temperature": spec.temperature, "seed": spec.seed}
            drawn |= {"beams": spec.beams} if spec.beams > 1 else {}
            rows.append(plain(names | said | _reply_columns(replies, kls[policy]) | drawn | usages.get(judge, {})))
    return Evaluation(rows, samples, scores, outcomes, rewards, over)


def measure_kl(bench: Workbench, replies: Sequence[Sample]) -> KL:
    """KL of the replies' policy to the evaluation's reference."""
    policy, reference = replies[0].policy, bench.spec.reference
    return bench.kl(bench.roles[policy], bench.roles[reference], replies, f"{policy}: KL to {reference}")


def _reply_columns(replies: Sequence[Sample], kl: KL | None) -> dict[str, Any]:
    """What is true of a policy's replies whoever judges them."""
    return measure_replies(replies) | {
        "kl": kl.per_sequence if kl else None,
        "kl_se": kl.per_sequence_se if kl else None,
        "kl_per_token": kl.per_token if kl else None,
    }


def _write(final: Path, evaluation: Evaluation) -> None:
    """The files of RUN/eval; the folder appears whole or not at all."""
    with whole_folder(final) as folder:
        contents = {RESULTS: evaluation.rows, REWARDS: evaluation.reward_models or None}
        for name, content in {**contents, OVER_OPTIMISATION: evaluation.over_optimisation}.items():
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
