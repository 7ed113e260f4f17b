"""The single measurements behind `preftune eval winrate | kl | perplexity | reward`; each returns rows to print."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data.encode import IGNORED, encode_demos
from ..data.load import load_rows
from ..data.rows import Row
from ..data.spec import DataSpec, RowKind
from ..data.split import held_out_rows
from ..errors import UserError
from ..progress import meter
from ..values import plain
from .perplexity import sequence_nlls, summarise
from .reward_models import measure_reward_models
from .run import evaluate, measure_kl
from .spec import BASE, EvalSpec, RewardModel
from .workbench import Workbench


def eval_winrate(spec: EvalSpec, run_dir: Path | None = None) -> list[dict[str, Any]]:
    """Win-rates alone: the rows of results.json without KL. Writes nothing."""
    rows = evaluate(replace(spec, kl=False, reward_models=(), over_optimisation=None, benchmarks=None), run_dir).rows
    return [{key: value for key, value in row.items() if not key.startswith("kl")} for row in rows]


def eval_kl(spec: EvalSpec) -> list[dict[str, Any]]:
    """KL(policy || reference) of every policy, on replies drawn for it. Writes nothing.

    Returns:
        One row per policy: policy, reference, n, tokens, kl, kl_se, kl_per_token, kl_per_token_se, temperature, seed.
    """
    if spec.temperature <= 0:
        raise UserError("eval.temperature", "is 0, and greedy decoding has no KL", "set it above 0")
    bench = Workbench.open(spec)
    prompts = bench.prompts()
    rows = []
    for policy in bench.roles:
        kl = measure_kl(bench, bench.samples(policy, prompts))
        row = {
            "policy": policy,
            "reference": spec.reference,
            "n": kl.n,
            "tokens": kl.tokens,
            "kl": kl.per_sequence,
            "kl_se": kl.per_sequence_se,
            "kl_per_token": kl.per_token,
            "kl_per_token_se": kl.per_token_se,
            "temperature": kl.temperature,
            "seed": spec.seed,
        }
        rows.append(plain(row))
    return rows


def eval_perplexity(spec: EvalSpec, data: DataSpec) -> list[dict[str, Any]]:
    """Perplexity of demonstrations under every policy, over the tokens that SFT would train. Writes nothing.

    Args:
        data: demonstrations (or pairs, whose chosen side counts); with `held_out` only the part that the training
            left out.

    Returns:
        One row per policy: policy, nll, nll_se, perplexity, ci_low, ci_high, n, tokens.
    """
    bench = Workbench.open(spec)
    dataset, _ = encode_demos(_rows(spec, data, "demo"), bench.tokenizer, data)
    input_ids, labels = list(dataset["input_ids"]), list(dataset["labels"])
    # The first token of a row has nothing before it, so it is never predicted.
    tokens = [sum(label != IGNORED for label in row[1:]) for row in labels]
    rows = []
    for policy, role in bench.roles.items():
        with meter(f"eval {policy}: perplexity", len(input_ids)) as done:
            nlls = sequence_nlls(
                bench.adapters, role, input_ids, labels, pad_token_id=bench.tokenizer.pad_token_id, on_batch=done
            )
        rows.append(plain({"policy": policy, **asdict(summarise(nlls, tokens))}))
    return rows


def eval_reward(spec: EvalSpec, models: Sequence[RewardModel], *, skip: bool = False) -> list[dict[str, Any]]:
    """Metrics of reward models and implicit rewards on pairs. Writes nothing.

    Args:
        spec: for its base, dtype, folders and chat template; its policies are not loaded.
        models: what to measure, each on its own data.
        skip: what cannot be measured is named in the log and left out, as long as something remains.

    Returns:
        One row per model (see `measure_reward_models`).
    """
    bench = Workbench.open(replace(spec, policies={}, reference=BASE, reward_models=()))
    rows = measure_reward_models(bench, models, skip=skip)
    if not rows:
        names = ", ".join(model.stage for model in models)
        raise UserError("eval reward", f"none of {names} can be measured", "name one with --stage to see why")
    return rows


def _rows(spec: EvalSpec, data: DataSpec, kind: RowKind) -> list[Row]:
    """The rows to measure on: what training on the same data entry left out, or all where it left out none."""
    return held_out_rows(load_rows(data, kind, spec.folders).rows, data)
