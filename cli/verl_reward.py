"""What a preftune recipe gives for a reply, as verl's `reward.custom_reward_function` (copied beside `reward.json`).

It runs where verl runs and imports nothing of preftune. verl serves the reward model, a sequence classifier; a function
of the recipe's is called with TRL's arguments. Scores are centred, weighted, added, scaled and clipped as in preftune.
"""

import importlib
import inspect
import json
import math
import sys
import urllib.request
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_PATIENCE = 600
"""Seconds that one score may take."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> float:
    """The score of one reply.

    Args:
        solution_str: the reply without special tokens.
        extra_info: what the exported rows hold: the prompt's messages, its text, the other columns.
        reward_router_address: host and port of verl's server of the reward model.
    """
    settings = json.loads((_HERE / "reward.json").read_text(encoding="utf-8"))
    total = 0.0
    for source in settings["sources"]:
        if source["kind"] == "function":
            score = _of_function(source, settings["paths"], solution_str, extra_info)
        else:
            text = _text(source, solution_str, extra_info, reward_model_tokenizer)
            # verl names the model that it serves by the path in its own settings
            model = settings["model"] if source["kind"] == "model" else str(_HERE / settings["model"])
            score = _served(str(reward_router_address), model, text)
        # None: the source does not apply to this reply
        if score is not None and not math.isnan(score):
            total += source["weight"] * (score - source["mean"]) / source["std"]
    clip = settings["clip"]
    return total if clip is None else max(-clip, min(clip, total))


def _text(source: dict[str, Any], reply: str, row: dict[str, Any], tokenizer: Any) -> str:
    """What the reward model reads. A reward stage's ends at EOS, where its score was trained to be read; the template's
    tail after it would move the score."""
    if source["kind"] == "stage":
        return row["prompt_text"] + reply + source["eos"]
    turns = [*json.loads(row["messages"]), {"role": "assistant", "content": reply}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _served(address: str, model: str, text: str) -> float:
    """The classifier's one output, as it is: no sigmoid, and no token beside the text's own."""
    asked = {"model": model, "input": text, "use_activation": False, "add_special_tokens": False}
    request = urllib.request.Request(
        f"http://{address}/classify", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        return float(json.load(answer)["data"][-1]["probs"][-1])


def _of_function(source: dict[str, Any], paths: list[str], reply: str, row: dict[str, Any]) -> float | None:
    sys.path += [each for each in paths if each not in sys.path]
    module, _, name = source["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    given = {key: [value] for key, value in json.loads(row["columns"]).items()}
    given["prompts"] = [json.loads(row["messages"])]
    given["completions"] = [[{"role": "assistant", "content": reply}]]
    taken = inspect.signature(function).parameters.values()
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken):
        given = {each.name: given[each.name] for each in taken if each.name in given}
    (score,) = list(function(**given))
    return None if score is None else float(score)
