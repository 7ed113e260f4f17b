"""How much reward for how much KL: PPO, GRPO, RLOO, DPO and best of n on the quickstart task, with a known reward.

    preftune run quickstart --until reward --output-dir runs/longer data.demos.limit=600 data.pairs.limit=480 \\
        stages.sft.train.learning_rate=2e-4
    python -m preftune.benchmarks.frontier --run runs/longer

The reward is the rubric itself, so nothing can be gained by fooling a reward model. PPO is rewarded with it and held to
KL targets over a decade by the adaptive controller, GRPO and RLOO by their beta, with as many episodes; best of n picks
by it; DPO learns from the shipped pairs, whose better side passes more of it. All start from the same SFT policy and
are measured on the same prompts. `--only GRPO RLOO` measures these and keeps the other points of the file.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .measure import RESULTS, figure, machine, write_result
from .quick import Trial, run_trials

KL_TARGETS = (1, 3, 10)
BETAS = (0.03, 0.1, 0.3, 1.0)
BEST_OF = 16
GROUP_BETAS = {"GRPO": (0.01, 0.04, 0.2), "RLOO": (0.03, 0.1, 0.3)}
"""GRPO's beta counts by the token, against advantages of one standard deviation; RLOO's by the reply and reward."""
KL_TICKS = (0, 0.2, 0.5, 1, 2, 4, 6, 8, 10)
REWARD = '[{function: "preftune.benchmarks.quick:rubric_scores"}]'
GROUP = (
    f"{{from: sft, data: prompts, reward: {REWARD}, num_generations: 8, rollout_batch_size: 32, total_episodes: 288, "
    "num_iterations: 2, num_mini_batches: 2, max_new_tokens: 64, temperature: 0.7, "
    "train: {learning_rate: 1e-4, lr_scheduler_type: constant, per_device_train_batch_size: 8}"
)
"""A stage of GRPO or RLOO: episodes, rollouts, steps and learning rate are the quickstart's PPO's, but for `LONGER`."""
METHODS = {"PPO": "ppo", **{name: name.lower() for name in GROUP_BETAS}, "DPO": "dpo", "best of n": "sft"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/longer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--name", default="frontier")
    args = parser.parse_args()
    stages = [METHODS[name] for name in args.only]
    trials = [trial for seed in range(args.seeds) for trial in _trials(seed) if trial.stage in stages]
    measured = [point for found in run_trials(args.run, trials) for point in _points(found)]
    before = _before(args.name) if len(stages) < len(METHODS) else []
    points = [*(point for point in before if point["stage"] not in stages), *measured]
    result = {"seeds": args.seeds, "points": points}
    print(table(points))
    draw(points, RESULTS / f"{args.name}.svg")
    print(write_result(args.name, result))


def _before(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["points"]


def _trials(seed: int) -> list[Trial]:
    ppo = [
        # the coefficient starts about where the target wants it; nine iterations are few for the controller alone
        Trial(
            "ppo",
            (
                f"stages.ppo.reward={REWARD}",
                f"stages.ppo.kl={{coef: {0.3 / target:.3f}, target: {target}, horizon: 64}}",
            ),
            seed,
            name=f"PPO, target {target}",
        )
        for target in KL_TARGETS
    ]
    dpo = [Trial("dpo", (f"stages.dpo.beta={beta}",), seed, name=f"DPO, beta {beta}") for beta in BETAS]
    groups = [
        Trial(METHODS[name], (f"stages.{METHODS[name]}={GROUP}, beta: {beta}}}",), seed, name=f"{name}, beta {beta}")
        for name, betas in GROUP_BETAS.items()
        for beta in betas
    ]
    return [*ppo, *groups, *dpo, Trial("sft", seed=seed, best_of=BEST_OF, name="best of n")]


def _points(found: dict[str, Any]) -> list[dict[str, Any]]:
    trial = found["trial"]
    where = machine()
    said = {"stage": trial["stage"], "seed": trial["seed"], "device": where["device"], "date": where["date"]}
    if trial["best_of"]:
        return [{"name": f"best of {n}", **said, **score} for n, score in found["score"].items()]
    return [{"name": trial["name"], **said, **found["score"]}]


def _by_name(points: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        names.setdefault(point["name"], []).append(point)
    return names


def _mean(points: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(point[key] for point in points)


def table(points: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, and each seed's reward, as Markdown."""
    lines = ["| method | KL to SFT | rubric | by seed | length |", "|---|---|---|---|---|"]
    for name, each in _by_name(points).items():
        kl, rubric, length = (_mean(each, key) for key in ("kl", "rubric", "length"))
        seeds = ", ".join(f"{point['rubric']:.3f}" for point in each)
        lines.append(f"| {name} | {kl:.2f} | {rubric:.3f} | {seeds} | {length:.1f} |")
    return "\n".join(lines)


def draw(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Reward against KL: every seed a dot, every method a line through its means."""
    lines = {
        "PPO": ("PPO on the rubric", "#1f6feb"),
        "GRPO": ("GRPO on the rubric", "#8250df"),
        "RLOO": ("RLOO on the rubric", "#bf3989"),
        "DPO": ("DPO on pairs", "#d1661f"),
        "best": ("best of n by the rubric", "#3d8b40"),
    }
    with figure(file, 1, 7, 4.5) as (axis,):
        for method, (label, colour) in lines.items():
            groups = [each for name, each in _by_name(points).items() if name.startswith(method)]
            if not groups:
                continue
            dots = [point for each in groups for point in each]
            axis.scatter([p["kl"] for p in dots], [p["rubric"] for p in dots], s=14, color=colour, alpha=0.4)
            means = sorted((_mean(each, "kl"), _mean(each, "rubric"), each[0]["name"]) for each in groups)
            axis.plot([m[0] for m in means], [m[1] for m in means], "o-", color=colour, label=label)
            # lines that run side by side have their words on opposite sides
            left = method in ("GRPO", "RLOO")
            for place, (kl, rubric, name) in enumerate(means):
                said = name.partition(", ")[2] or name
                where = {"xytext": (-6, 4 + 7 * (place % 2)) if left else (6, -9), "ha": "right" if left else "left"}
                axis.annotate(said, (kl, rubric), textcoords="offset points", fontsize=7, color=colour, **where)
        axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axis.set_xticks(KL_TICKS, [f"{tick:g}" for tick in KL_TICKS])
        axis.set_xlabel("KL to SFT (nats per sequence, square-root scale)")
        axis.set_ylabel("rubric: share of checks passed")
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.18, 0.0), fontsize=7)


def redraw(name: str = "frontier") -> None:
    """The figure again, from the committed numbers."""
    draw(_before(name), RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
