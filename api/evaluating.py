"""`evaluate`: policies side by side, as `preftune eval run` has it; nothing is written."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.policies import evaluation_of, run_recipe
from ..data.spec import DataSpec, SourceSpec
from ..errors import UserError, nearest
from ..files import RECIPE
from ..recipes.schema import BASE
from ..values import plain
from .models import Policy, named
from .prompts import STRICT, Prompts, listed
from .results import EvaluationResult, RunResult
from .session import session
from .sources import Source, find_source, one_base

if TYPE_CHECKING:
    from ..eval.results import Evaluation
    from ..eval.spec import EvalSpec

PolicyName = Policy | str | Path | tuple[str | Path, str] | None
"""What `load_policy` takes, (run, stage), what it gave; None is the base."""


def evaluate(
    run_or_policies: RunResult | str | Path | Mapping[str, PolicyName] | Sequence[PolicyName],
    prompts: Prompts | None = None,
    judges: Sequence[Mapping[str, Any]] | None = None,
    *,
    policies: Sequence[str] | None = None,
    reference: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    kl: bool | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Every policy answers the same prompts; the judges compare with the reference, with 95% intervals. Writes nothing.

    >>> preftune.evaluate("runs/x", policies=["sft", "dpo"]).to_pandas()
    >>> preftune.evaluate({"mine": "runs/x/dpo", "start": "runs/x/sft"}, ["Hi"], reference="start")

    Args:
        run_or_policies: a run, whose recipe says what is not said here; or policies on one base, by name or as a list.
        prompts: as of `Policy.generate`; None: the recipe's.
        judges: as in a recipe: `[{"kind": "reward", "adapter": "runs/x/reward"}]`. Default: the recipe's; of policies
            none.
        policies: of a run, these alone.
        reference: what they are compared with, by name. Default: the recipe's; of policies the first.
        max_new_tokens, temperature, seed: of the replies. Default: the recipe's; of policies 48 tokens, 0.7 and 0.
        kl: measure KL(policy || reference) too. Default: the recipe's; of policies yes, unless they are greedy.
        quiet: show no progress.

    Raises:
        UserError: for what can be put right in policies, prompts or judges.
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "kl": kl}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with session(quiet), tempfile.TemporaryDirectory() as folder:
        run: Path | None = None
        if isinstance(run_or_policies, RunResult | str | Path):
            run = run_or_policies.path if isinstance(run_or_policies, RunResult) else Path(run_or_policies).expanduser()
            spec = _of_run(run, policies)
        else:
            if policies is not None:
                raise UserError("policies=", "is for a run, and policies are given", "leave it out")
            spec = _of_policies(run_or_policies, reference)
            changes.setdefault("kl", changes.get("temperature", spec.temperature) > 0)
            if prompts is None:
                raise UserError("prompts", "are missing", "give them, or a run, whose recipe has some")
        if prompts is not None:
            changes["prompts"] = _data(prompts, Path(folder), spec.prompts.system)
        if reference is not None:
            changes["reference"] = _known(reference, spec)
        if judges is not None:
            changes["judges"] = tuple(dict(each) for each in judges)
        if prompts is not None:
            # of the recipe's own data: not what was asked
            changes |= {"reward_models": (), "over_optimisation": None, "benchmarks": None}
        spec = replace(spec, **changes)
        from ..eval.run import evaluate as measure

        return _result(measure(spec, run))


def _of_run(run: Path, policies: Sequence[str] | None) -> "EvalSpec":
    if not (run / RECIPE).is_file():
        remedy = "give a run's folder, or policies by name: {'dpo': 'runs/x/dpo'}"
        raise UserError(str(run), f"holds no {RECIPE}", remedy)
    if isinstance(policies, str):
        raise UserError("policies=", f"is {policies!r}, expected a list of names", f"write [{policies!r}]")
    # its result has no place for standard benchmarks
    return replace(evaluation_of(run_recipe(run), run, policies, "policies="), benchmarks=None)


def _of_policies(given: Mapping[str, PolicyName] | Sequence[PolicyName], reference: str | None) -> "EvalSpec":
    pairs = list(given.items()) if isinstance(given, Mapping) else [("", each) for each in given]
    sources = [(name, None if each is None else _source(each)) for name, each in pairs]
    known = [source for _, source in sources if source is not None]
    if not known:
        raise UserError("evaluate", "no policy is given", "give at least one besides the base")
    one_base("evaluate", known)
    named_: dict[str, Path | None] = {}
    for name, source in sources:
        called = name or (BASE if source is None else source.name)
        if called in named_:
            said = f"two policies are called {called!r}"
            raise UserError("evaluate", said, "name them: {'a': ..., 'b': ...}")
        named_[called] = None if source is None else source.folder
    first = next(iter(named_))
    if reference is not None and reference not in (*named_, BASE):
        raise UserError("reference=", f"no policy {reference!r}", nearest(reference, [*named_, BASE]))
    return replace(known[0].spec(named_), reference=reference or first)


def _source(policy: Policy | str | Path | tuple[str | Path, str]) -> Source:
    return policy.source if isinstance(policy, Policy) else find_source(*named(policy))


def _known(reference: str, spec: "EvalSpec") -> str:
    if reference not in (*spec.policies, BASE):
        raise UserError("reference=", f"no policy {reference!r}", nearest(reference, [*spec.policies, BASE]))
    return reference


def _data(prompts: Prompts, folder: Path, system: str | None) -> DataSpec:
    """A data entry for prompts in memory: everything that reads prompts reads a file of them."""
    file = folder / "prompts.jsonl"
    if isinstance(prompts, Path):
        return DataSpec((SourceSpec(str(prompts.expanduser().resolve())),), max_length=None, system=system)
    lines = [json.dumps({"prompt": each}, ensure_ascii=False) + "\n" for each in listed(prompts)]
    file.write_text("".join(lines), encoding="utf-8")
    return replace(STRICT, sources=(SourceSpec(str(file)),), system=system)


def _result(found: "Evaluation") -> EvaluationResult:
    samples = []
    for policy, replies in found.samples.items():
        for place, reply in enumerate(replies):
            tables = (("scores", found.scores), ("outcomes", found.outcomes))
            judged = {
                name: {judge: values[place] for (whose, judge), values in table.items() if whose == policy}
                for name, table in tables
            }
            samples.append(plain({**reply.as_dict(), **judged}))
    parts = (tuple(found.rows), tuple(samples), tuple(found.reward_models))
    return EvaluationResult(*parts, found.over_optimisation, found.benchmarks)
