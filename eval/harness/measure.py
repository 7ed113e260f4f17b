"""Every policy's answers to the tasks, and what each has gained or lost against the base."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ...errors import UserError
from ...progress import say
from ...values import plain
from ..spec import BASE, Benchmarks
from ..statistics.intervals import Z95
from ..workbench import Workbench
from .influence import Values, influences, standard_error
from .tasks import FEWSHOT_SEED, PLACE, Loaded, load_tasks, quiet

FORMAT = 1


def measure_benchmarks(bench: Workbench, asked: Benchmarks, loaded: Loaded | None = None) -> dict[str, Any]:
    """The content of benchmarks.json: every policy of the workbench and the base, on the tasks.

    Args:
        loaded: the tasks, where they are loaded already.

    Returns:
        format, lm_eval (its version), settings, policies (name -> hash of its adapter, None for the base), and rows:
        policy, task, metric, filter, value, stderr, n, higher_is_better, difference to the base, difference_se,
        difference_low, difference_high (95%), paired (by document), few_shot, cut (prompts of the policy's whole
        benchmark that did not fit the base's context).

    Raises:
        UserError: see `load_tasks`; a task that fails while it is asked.
    """
    loaded = loaded or load_tasks(asked)
    roles = {BASE: None, **bench.roles}
    results = {policy: _answers(bench, policy, loaded, asked) for policy in roles}
    rows = [row for policy in bench.roles for row in _rows(policy, results[policy], results[BASE]) if results[policy]]
    if BASE not in bench.roles:
        rows = [*_rows(BASE, results[BASE], results[BASE]), *rows]
    settings = {name: value for name, value in asdict(asked).items() if value is not None}
    content = {
        "format": FORMAT,
        "lm_eval": loaded.version,
        "settings": {**settings, "tasks": list(asked.tasks)},
        "policies": {policy: None if policy == BASE else bench.adapter_of(policy) for policy in roles},
        "rows": rows,
    }
    return plain({**content, "settings": {name: _text(value) for name, value in content["settings"].items()}})


def _text(value: Any) -> Any:
    return value if isinstance(value, int | float | bool | list) else str(value)


def _answers(bench: Workbench, policy: str, loaded: Loaded, asked: Benchmarks) -> dict[str, Any]:
    """What lm-eval finds for one policy."""
    from lm_eval.evaluator import evaluate

    from .policy_lm import PolicyLM

    speaker = PolicyLM(bench, policy)
    with quiet():
        for task in loaded.tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            found: Any = evaluate(
                speaker,
                loaded.whole,
                limit=asked.limit,
                bootstrap_iters=0,
                apply_chat_template=asked.apply_chat_template,
                fewshot_as_multiturn=asked.apply_chat_template,
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            remedy = "correct the task's file; `lm-eval validate --tasks NAME --include_path DIR` says more"
            raise UserError(f"{PLACE}.tasks", f"a task fails: {said}", remedy) from error
    if speaker.cut:
        say(
            f"eval {policy}: benchmarks: {speaker.cut} prompts were longer than the base's context, and cut on the left"
        )
    return {**found, "cut": speaker.cut}


def _rows(policy: str, ours: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task, results in ours["results"].items():
        for key, value in results.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            theirs = base["results"][task][key]
            own, other = (
                _influences(ours, task, metric, filtered, value),
                _influences(base, task, metric, filtered, theirs),
            )
            said = results.get(f"{metric}_stderr,{filtered}")
            stderr = standard_error(own) if own is not None else said if isinstance(said, int | float) else None
            row = {
                **{"policy": policy, "task": task, "metric": metric, "filter": filtered},
                **{"value": float(value), "stderr": stderr, "n": len(_samples(ours, task, metric, filtered))},
                "higher_is_better": ours.get("higher_is_better", {}).get(task, {}).get(metric),
                "few_shot": ours.get("n-shot", {}).get(task),
                "cut": ours["cut"],
            }
            yield row | (_difference(float(value) - float(theirs), own, other) if policy != BASE else {})


def _difference(value: float, own: Values | None, other: Values | None) -> dict[str, Any]:
    paired = own is not None and other is not None and len(own) == len(other)
    error = standard_error(own - other) if own is not None and other is not None and paired else math.nan
    low, high = value - Z95 * error, value + Z95 * error
    known = {"difference_se": error, "difference_low": low, "difference_high": high} if paired else {}
    return {"difference": value, **known, "paired": paired}


def _leaves(found: Mapping[str, Any], task: str) -> list[str]:
    """The tasks that a group is made of, or the task itself."""
    below = found.get("group_subtasks", {}).get(task)
    return [leaf for each in below for leaf in _leaves(found, each)] if below else [task]


def _samples(found: Mapping[str, Any], task: str, metric: str, filtered: str) -> list[Mapping[str, Any]]:
    """The documents that a metric is made of, in their order."""
    return [
        sample
        for leaf in _leaves(found, task)
        for sample in sorted(found["samples"].get(leaf, ()), key=lambda each: each["doc_id"])
        if sample["filter"] == filtered and metric in sample
    ]


def _influences(found: Mapping[str, Any], task: str, metric: str, filtered: str, value: Any) -> Values | None:
    samples = _samples(found, task, metric, filtered)
    return influences([each[metric] for each in samples], float(value)) if samples else None
