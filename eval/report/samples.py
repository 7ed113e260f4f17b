"""The replies side by side, and what the filter needs to know of them.

Replies are text that nobody vouches for: all of it goes through the template's escaping, and what the filter needs
through `json_for_script`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from .read import Run, number

MAX_PROMPTS = 200
TEXT_BUDGET = 1_100_000
"""Bytes of prompts and replies on the page; where there are more, long ones are cut at one of `_CUTS` characters."""
_CUTS = (16_000, 8_000, 4_000, 2_000, 1_200, 800, 400, 200)
WORDS = {"win": "win", "tie": "tie", "loss": "loss"}


def browser(run: Run) -> dict[str, Any] | None:
    """What the samples' section shows; None where there are no samples."""
    prompts = _prompts(run.samples)
    if not prompts:
        return None
    shown = [prompts[index] for index in sorted(prompts)][:MAX_PROMPTS]
    policies, reference = run.policies(), run.reference()
    for each in shown:
        each["replies"].sort(key=lambda reply: policies.index(reply["policy"]))
        _fill_outcomes(each["replies"], reference)
    cut = _cut_at(shown)
    judges = list(dict.fromkeys(judge for each in shown for reply in each["replies"] for judge in reply["verdicts"]))
    return {
        "prompts": [_shorten(each, cut) for each in shown],
        "total": len(prompts),
        "cut": cut,
        "policies": [policy for policy in policies if policy != reference],
        "places": {policy: place for place, policy in enumerate(policies)},
        "judges": judges,
        "reference": reference,
        "data": json_for_script(
            [{reply["policy"]: reply["verdicts"] for reply in each["replies"] if reply["verdicts"]} for each in shown]
        ),
    }


def verdict(outcome: float) -> str:
    """win, tie or loss: which side of one half the outcome is on (a judge asked in both orders may stand between)."""
    return "win" if outcome > 0.5 else "loss" if outcome < 0.5 else "tie"


def json_for_script(value: Any) -> Markup:
    """JSON that can stand in a <script> element whatever is in it: no <, >, & or line separator is left in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _prompts(samples: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in samples:
        entry = found.setdefault(line["prompt_index"], {"index": line["prompt_index"], "prompt": [], "replies": []})
        entry["prompt"] = entry["prompt"] or list(line.get("prompt") or [])
        entry["replies"].append(dict(line))
    return found


def _fill_outcomes(replies: list[dict[str, Any]], reference: str | None) -> None:
    """`verdicts` {judge: win, tie or loss} of each reply: as recorded, else from both sides' scores."""
    theirs = next((reply.get("scores") or {} for reply in replies if reply["policy"] == reference), {})
    for reply in replies:
        outcomes = dict(reply.get("outcomes") or {})
        if not outcomes and reply["policy"] != reference:
            for judge, score in (reply.get("scores") or {}).items():
                ours, other = number(score), number(theirs.get(judge))
                if ours is not None and other is not None:
                    outcomes[judge] = 0.5 + 0.5 * ((ours > other) - (ours < other))
        known = {judge: number(outcome) for judge, outcome in outcomes.items()}
        reply["verdicts"] = {judge: verdict(outcome) for judge, outcome in known.items() if outcome is not None}


def _cut_at(prompts: Sequence[Mapping[str, Any]]) -> int | None:
    """The longest cut under which all texts fit the budget; None where they fit as they are."""
    texts = [text for each in prompts for text in _texts(each)]

    def fits(cut: int | None) -> bool:
        # as they stand in the page: a reply in Chinese or full of markup takes several bytes per character
        return sum(len(escape(text[:cut]).encode(errors="replace")) for text in texts) <= TEXT_BUDGET

    return None if fits(None) else next((cut for cut in _CUTS if fits(cut)), _CUTS[-1])


def _texts(prompt: Mapping[str, Any]) -> list[str]:
    said = [str(message.get("content") or "") for message in prompt["prompt"]]
    return said + [str(reply.get("completion") or "") for reply in prompt["replies"]]


def _shorten(prompt: dict[str, Any], cut: int | None) -> dict[str, Any]:
    messages = [{"role": m.get("role"), "content": _short(m.get("content"), cut)} for m in prompt["prompt"]]
    replies = [{**reply, "completion": _short(reply.get("completion"), cut)} for reply in prompt["replies"]]
    return {**prompt, "prompt": messages, "replies": replies}


def _short(value: Any, cut: int | None) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return text if cut is None or len(text) <= cut else f"{text[:cut]}… [{len(text) - cut} more characters]"
