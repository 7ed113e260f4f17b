"""PPO of the quickstart recipe in ten seeds, nothing else changed: does any of them collapse?

    preftune run quickstart --until reward --output-dir runs/longer data.demos.limit=600 data.pairs.limit=480 \\
        stages.sft.train.learning_rate=2e-4
    python -m preftune.benchmarks.ppo_seeds --run runs/longer

A seed has collapsed when its policy's rubric score at the end is below SFT's, or its KL above three times the target.
The seed decides which prompts come when, and what is said to them.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ..recipes.load import load_recipe
from .measure import RESULTS, figure, machine, write_result
from .quick import LONGER, RECIPE, Trial, run_trials

CURVES = {
    "objective/scores": "reward (standard deviations)",
    "objective/kl": "KL (nats per sequence)",
    "rollout/entropy_per_token": "entropy (nats per token)",
    "rollout/length": "length (tokens)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/longer"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides, to try other settings")
    parser.add_argument("--name", default="ppo_seeds")
    args = parser.parse_args()
    target = load_recipe(RECIPE, [*LONGER, *args.set]).stages["ppo"].method().get("kl_target")
    sft, *seeds = run_trials(
        args.run,
        [
            Trial("sft", name="sft"),
            *(Trial("ppo", tuple(args.set), seed, name=f"seed {seed}") for seed in range(args.seeds)),
        ],
    )
    for each in seeds:
        score = each["score"]
        each["collapsed"] = score["rubric"] < sft["score"]["rubric"] or (target and score["kl"] > 3 * target)
    rubrics = [each["score"]["rubric"] for each in seeds]
    result = {
        "machine": machine(),
        "kl_target": target,
        "overrides": args.set,
        "sft": sft["score"],
        "collapsed": sum(bool(each["collapsed"]) for each in seeds),
        "rubric_mean": statistics.fmean(rubrics),
        "rubric_std": statistics.stdev(rubrics) if len(rubrics) > 1 else 0.0,
        "seeds": [
            {
                "seed": each["trial"]["seed"],
                **each["score"],
                "collapsed": bool(each["collapsed"]),
                "curves": {
                    "episode": [line["episode"] for line in each["log"] if "episode" in line],
                    **{key: [round(line[key], 4) for line in each["log"] if key in line] for key in CURVES},
                },
            }
            for each in seeds
        ],
    }
    print(table(result))
    draw(result, RESULTS / f"{args.name}.svg")
    print(write_result(args.name, result))


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| seed | rubric | KL to SFT | length | replies that end | collapsed |", "|---|---|---|---|---|---|"]
    sft = result["sft"]
    lines.append(f"| SFT | {sft['rubric']:.3f} | 0 | {sft['length']:.1f} | {sft['ended']:.2f} | |")
    lines += [
        f"| {each['seed']} | {each['rubric']:.3f} | {each['kl']:.1f} | {each['length']:.1f} | {each['ended']:.2f} | "
        f"{'yes' if each['collapsed'] else 'no'} |"
        for each in result["seeds"]
    ]
    return "\n".join(lines)


def draw(result: dict[str, Any], file: Path) -> None:
    """Every seed's curves over episodes."""
    with figure(file, len(CURVES), 13, 3.2) as axes:
        for axis, (key, label) in zip(axes, CURVES.items(), strict=True):
            for each in result["seeds"]:
                curves = each["curves"]
                axis.plot(curves["episode"], curves[key], linewidth=1.2, alpha=0.8, label=str(each["seed"]))
            axis.set_title(label, fontsize=10)
            axis.set_xlabel("episodes", fontsize=9)
        if target := result["kl_target"]:
            axes[1].axhline(target, color="black", linestyle="--", linewidth=1)
            axes[1].annotate("target", (0.02, target), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        axes[-1].legend(title="seed", fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def redraw(name: str = "ppo_seeds") -> None:
    """The figure again, from the committed numbers."""
    draw(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
