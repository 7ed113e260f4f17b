"""The first screen: what came out in words, and the numbers that matter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..judges.self_preference import self_judged
from ..results import silence_words
from .doctor import gaps, worst
from .read import Run, number
from .reward_models import accuracy_words, reward_rows
from .text import duration, fixed, listed, percent, percents, plus_minus, short, size

_UNDONE = {"failed": "failed", "running": "was still running", "stopped": "was stopped before its end"}


def verdict(run: Run) -> list[str]:
    """The outcome in sentences: one for each judge, then the doctor's worst finding."""
    sentences, leader = [], None
    for judge in run.judges():
        row = best(run, judge)
        if row is not None:
            equals = _equals(run, judge, row)
            first = judge == run.judges()[0]
            sentences.append(_judge_sentence(judge, row, equals, with_kl=first or row["policy"] != leader))
            leader = row["policy"] if first else leader
            sentences.append(_worse_sentence(run, judge, row))
    sentences += [f"{said[0].upper()}{said[1:]}." for said in silence_words(run.results)]
    sentences += self_judged(run.plan, run.policies(), run.folder or Path(run.name)).values()
    if not run.results:
        done = [stage.name for stage in run.stages if stage.state == "done" and stage.trains]
        sentences = [f"{listed(done)} {'is' if len(done) == 1 else 'are'} trained; nothing has been evaluated yet."]
        if not done:
            sentences = ["No stage is finished yet."]
    elif not run.judges():
        sentences = ["The policies were sampled, and no judge compared them."]
    for stage in run.stages:
        if stage.state in _UNDONE:
            sentences.append(f"The stage {stage.name} {_UNDONE[stage.state]}.")
    found = worst(run)
    if found is not None:
        sentences.append(found)
    sentences.append(gaps(run))
    return [sentence for sentence in sentences if sentence]


def _worse_sentence(run: Run, judge: str, leader: Mapping[str, Any]) -> str:
    """Names the policies that lose to the reference with all of their interval; the nearest one is named already."""
    worse = [
        row["policy"]
        for row in run.results
        if row.get("judge") == judge
        and row["policy"] not in (row.get("reference"), leader["policy"])
        and (high := number(row.get("ci_high"))) is not None
        and high < 0.5
    ]
    if not worse:
        return ""
    verb = "is" if len(worse) == 1 else "are"
    return Markup("By {}, <b>{}</b> {} clearly worse than {}.").format(judge, listed(worse), verb, leader["reference"])


def best(run: Run, judge: str) -> Mapping[str, Any] | None:
    """The judge's row with the highest win-rate against the reference; None where nothing was compared."""
    rows = [
        row
        for row in run.results
        if row.get("judge") == judge
        and row["policy"] != row.get("reference")
        and number(row.get("win_rate")) is not None
    ]
    return max(rows, key=lambda row: row["win_rate"], default=None)


def _equals(run: Run, judge: str, leader: Mapping[str, Any]) -> list[str]:
    """The policies that the leader is not clearly better than in their own comparison, the reference left out."""
    cells = leader.get("against") or {}
    return [
        policy
        for policy in run.policies()
        if policy not in (leader["policy"], leader.get("reference"))
        and (low := number((cells.get(policy) or {}).get("ci_low"))) is not None
        and low <= 0.5
    ]


def _judge_sentence(judge: str, row: Mapping[str, Any], equals: list[str], *, with_kl: bool) -> str:
    rate, low, high = (number(row.get(key)) for key in ("win_rate", "ci_low", "ci_high"))
    name, reference = row["policy"], row["reference"]
    kl = number(row.get("kl"))
    error = plus_minus(number(row.get("kl_se")), 1)
    distance = (
        "" if kl is None or not with_kl else f", at a KL of {fixed(kl, 1)}{f' {error}' if error else ''} nats per reply"
    )
    interval = f" (95% interval {percents(low, high)})" if low is not None and high is not None else ""
    counted = f"{percent(rate)} of {short(row.get('n'))} prompts against {reference}{interval}"
    if low is not None and low > 0.5 and equals:
        said = Markup("By {}, <b>{}</b> comes first: it wins {}{}; it is not clearly better than {}.")
        return said.format(judge, name, counted, distance, listed(equals))
    if low is not None and low > 0.5:
        return Markup("By {}, <b>{}</b> is best: it wins {}{}.").format(judge, name, counted, distance)
    if high is not None and high < 0.5:
        said = Markup("By {}, no policy beats {}: the nearest, <b>{}</b>, wins {}{}.")
        return said.format(judge, reference, name, counted, distance)
    said = Markup("By {}, no policy is clearly better than {}: <b>{}</b> comes first with {}{}.")
    return said.format(judge, reference, name, counted, distance)


def facts(run: Run) -> list[str]:
    """The line under the title: base, stages, prompts, the day of the last stage."""
    base = next((stage.lineage["base"].get("spec") for stage in run.stages if stage.lineage.get("base")), None)
    done = sum(stage.state == "done" and stage.trains for stage in run.stages)
    prompts = max((row["n"] for row in run.results if isinstance(row.get("n"), int)), default=0)
    days = [str(stage.lineage.get("created"))[:10] for stage in run.stages if stage.lineage.get("created")]
    said = [str(base)] if base else []
    said += [f"{done} stage{'s' if done > 1 else ''} trained{_descent(run)}"] if done else []
    said += [f"evaluated on {short(prompts)} prompts"] if prompts else []
    return said + ([max(days)] if days else [])


def _descent(run: Run) -> str:
    """What each finished stage started from: " (sft from base, dpo and ppo from sft)"; empty where nothing says."""
    children: dict[str, list[str]] = {}
    for stage in run.stages:
        if stage.state == "done" and stage.parents and stage.trains:
            start = next((name for name, scores in stage.parents if not scores), "base")
            children.setdefault(start, []).append(stage.name)
    words = [f"{listed(names)} from {start}" for start, names in children.items()]
    return f" ({', '.join(words)})" if words else ""


def cards(run: Run) -> list[dict[str, str]]:
    """The key numbers: label, value, and a small line under it."""
    found: list[dict[str, str]] = []
    for judge in run.judges()[:2]:
        row = best(run, judge)
        if row is not None:
            found.append(
                _card(
                    f"First by {judge}",
                    percent(row["win_rate"]),
                    f"{row['policy']} against {row['reference']}, {percents(row.get('ci_low'), row.get('ci_high'))}",
                )
            )
    leaders = [row for judge in run.judges() if (row := best(run, judge)) is not None]
    if leaders and number(leaders[0].get("kl")) is not None:
        row = leaders[0]
        found.append(
            _card(
                "KL", f"{fixed(row['kl'], 1)} nats", f"{row['policy']} to {row['reference']}, per reply"
                + (f", {plus_minus(row.get('kl_se'), 2)}" if number(row.get("kl_se")) is not None else ""),
            )
        )  # fmt: skip
    models = [row for row in reward_rows(run) if row.get("kind") != "implicit"]
    if models:
        row = models[0]
        pairs = "held-out pairs" if row.get("held_out") else "pairs"
        number_of = f"{row['stage']}, {short(row.get('n'))} {pairs}"
        interval = accuracy_words(row).partition(" (")[2].rstrip(")")
        found.append(_card("Reward accuracy", percent(row["accuracy"]), ", ".join(filter(None, (number_of, interval)))))
    found += _work(run)
    return found


def _work(run: Run) -> list[dict[str, str]]:
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None and stage.state == "done"]
    memory = [m for stage in run.stages if (m := number(stage.metrics.get("peak_memory_bytes"))) is not None]
    if not seconds:
        return []
    peak = f", peak memory {size(max(memory))}" if memory else ""
    stages = f"{len(seconds)} stage{'s' if len(seconds) > 1 else ''}"
    return [_card("Training time", duration(sum(seconds)), f"{stages}{peak}")]


def _card(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note.rstrip(", ")}
