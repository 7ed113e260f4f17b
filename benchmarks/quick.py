"""The quickstart task as an experiment: train one stage of it with changes, hold what it then says against the rubric.

Every trial starts from the SFT and reward adapters of one finished run; what differs is said in recipe overrides. A
trial runs in its own process with one thread, and as many run at once as there are cores.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..eval.statistics.intervals import mean_se
from ..recipes.build import eval_spec, stage_job
from ..recipes.load import load_recipe
from ..recipes.schema import Recipe

RECIPE = "quickstart"
LONGER = (
    "data.demos.limit=600",
    "data.pairs.limit=480",
    "data.fewer.limit=320",
    "stages.sft.train.learning_rate=2e-4",
    "stages.dpo.train.learning_rate=5e-5",
    "stages.ppo.total_episodes=288",
    "stages.ppo.kl.coef=0.05",
    "eval.prompts.limit=100",
)
"""The shipped recipe is as short as its own comparison bears; what differs by less wants more of everything."""


@dataclass(frozen=True)
class Trial:
    """One stage with recipe overrides, or `sft` as it is; `best_of` > 0: nothing trains, of so many SFT samples a
    prompt the best by the rubric is taken, and the best of the first half of them, and so on."""

    stage: str
    overrides: tuple[str, ...] = ()
    seed: int = 0
    best_of: int = 0
    name: str = ""


def run_trials(run: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What each trial came to, in their order: its own words, the stage's metrics and log, and `measure`."""

    def one(trial: Trial) -> dict[str, Any]:
        began = time.time()
        given = json.dumps(asdict(trial))
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--run", str(run), "--trial", given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{trial} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{trial.name}: {found['score']}, {time.time() - began:.0f} s", file=sys.stderr, flush=True)
        return {"trial": asdict(trial), **found}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, trials))


def rubric_scores(prompts: list[Any], completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """The task's rubric as a reward function, in units of about its own spread on SFT replies (a fifth)."""
    rubric = _rubric(load_recipe(RECIPE))
    return [5 * rubric.score(turns[-1]["content"]) for turns in completions]


def measure(recipe: Recipe, run: Path, policy: Path, seed: int, best_of: int = 0) -> dict[str, Any]:
    """Rubric score, KL to SFT in nats a sequence, length and share of ended replies, over the evaluation's prompts.

    With `best_of`, such a group for n = 1, 2, 4, ... up to it; its KL is the bound log n - (n - 1) / n (Beirami et al.,
    arXiv 2401.01879).
    """
    from ..eval.kl import sequence_kls
    from ..eval.samples import generate_samples
    from ..eval.workbench import Workbench
    from ..models.loading import resolve_base

    spec = eval_spec(recipe, resolve_base(recipe.base_spec), run, ["sft"])
    spec = dataclasses.replace(spec, policies={"sft": run / "sft", "policy": policy})
    bench = Workbench.open(spec)
    rubric, prompts = _rubric(recipe), bench.prompts()
    replies = generate_samples(
        bench.adapters,
        bench.roles["policy"],
        "policy",
        [prompt for prompt in prompts for _ in range(max(1, best_of))],
        bench.tokenizer,
        max_new_tokens=spec.max_new_tokens,
        temperature=spec.temperature,
        seed=seed,
        batch_size=spec.batch_size,
    )
    scores = [rubric.score(each.completion) for each in replies]
    if best_of:
        found, n = {}, 1
        while n <= best_of:
            firsts = [range(i, i + n) for i in range(0, len(replies), best_of)]
            best = [max(group, key=lambda i: scores[i]) for group in firsts]
            kl = math.log(n) - (n - 1) / n
            found[str(n)], n = _summary([replies[i] for i in best], [scores[i] for i in best], kl), 2 * n
        return found
    kls = sequence_kls(
        bench.adapters,
        bench.roles["policy"],
        bench.roles["sft"],
        [each.prompt.ids for each in replies],
        [each.tokens for each in replies],
        temperature=spec.temperature,
        pad_token_id=bench.tokenizer.pad_token_id,
    )
    return _summary(replies, scores, sum(kls) / len(kls))


def _summary(replies: Sequence[Any], scores: Sequence[float], kl: float) -> dict[str, float]:
    mean, se = mean_se(scores)
    return {
        "rubric": round(mean, 4),
        "rubric_se": round(se, 4),
        "kl": round(kl, 3),
        "length": round(sum(len(each.tokens) for each in replies) / len(replies), 2),
        "ended": round(sum(each.finished for each in replies) / len(replies), 3),
    }


def _rubric(recipe: Recipe) -> Any:
    from ..stages.scorers.rubric import parse_rubric

    assert recipe.eval is not None
    checks = next(each["checks"] for each in recipe.eval.judges if each["kind"] == "rubric")
    return parse_rubric(checks, "eval.judges")


def _work(run: Path, trial: Trial) -> dict[str, Any]:
    from ..models.loading import resolve_base
    from ..stages.run import run_stage

    seeded = () if trial.best_of or trial.stage == "sft" else (f"stages.{trial.stage}.seed={trial.seed}",)
    recipe = load_recipe(RECIPE, [*LONGER, *trial.overrides, *seeded])
    if trial.stage == "sft":
        return {"metrics": {}, "log": [], "score": measure(recipe, run, run / "sft", trial.seed, trial.best_of)}
    with tempfile.TemporaryDirectory(prefix="preftune-trial-") as folder:
        output = Path(folder) / trial.stage
        metrics = run_stage(stage_job(recipe, trial.stage, resolve_base(recipe.base_spec), run, output))
        log = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return {"metrics": metrics, "log": log, "score": measure(recipe, run, output, trial.seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--trial", required=True)
    args = parser.parse_args()
    fields = json.loads(args.trial)
    trial = Trial(**(fields | {"overrides": tuple(fields["overrides"])}))
    print(json.dumps(_work(args.run, trial), default=str))


if __name__ == "__main__":
    main()
