"""The card of a trained adapter: what a person finds beside it, and what a hub reads of it.

Made from its lineage and its metrics alone, so it can be made again at any time; names of files, never where they lie.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ADAPTER_CONFIG, METRICS, write_whole
from .added_tokens import without_tokens
from .base import HUB_ID
from .lineage import read_lineage

CARD = "README.md"
_MARK = re.compile(r"<!-- written by preftune ([0-9a-f]{12}): what you change in here is kept -->\n")
_SHOWN = (
    *("learning_rate", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
_METRICS = ("train_loss", "eval_loss", "eval_accuracy", "train_seconds", "examples_per_second", "tokens_per_second")
_LIBRARIES = ("preftune", "torch", "transformers", "trl", "peft")


def write_card(folder: Path, results: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Write the card of a finished adapter into its folder, unless somebody changed the one there; whether it did.

    Args:
        results: rows of the evaluation's results.json; those of this policy are shown.

    Raises:
        UserError: no lineage there, or a damaged one.
    """
    if keeps_card(folder):
        return False
    write_whole(folder / CARD, card(folder, results))
    return True


def keeps_card(folder: Path) -> bool:
    """Whether a card lies in the folder that somebody wrote or changed."""
    file = folder / CARD
    return file.is_file() and not _is_ours(file.read_text(encoding="utf-8", errors="replace"))


def card(folder: Path, results: Sequence[Mapping[str, Any]] = ()) -> str:
    """The card's text: front matter as the Hugging Face hub reads it, then what was done and how to load it."""
    lineage, config = read_lineage(folder), _object(folder / ADAPTER_CONFIG)
    (base, added), name = without_tokens(str(lineage.base["spec"])), lineage.stage
    libraries = ", ".join(f"{each} {lineage.versions[each]}" for each in _LIBRARIES if each in lineage.versions)
    shown = base if _portable(base) else Path(base).name
    rows, full = bool(config.get("trainable_token_indices")), bool(lineage.config.get("full"))
    what = f"`{shown}` with all its weights" if full else f"A LoRA adapter for `{shown}`,"
    how = "all weights, in fp32 while they trained" if full else _adapter(config)
    body = [
        f"# {name}",
        "",
        f"{what} trained with {_kind(lineage.kind)} by preftune.",
        "",
        "| what | |",
        "|---|---|",
        f"| base | `{shown}`, sha256 `{lineage.base['sha256'][:12]}` |",
        *([f"| new tokens | {added}: their rows are in the adapter, the tokenizer lies beside it |"] if added else []),
        *(f"| from | stage `{each['stage']}`, sha256 `{each['sha256'][:12]}` |" for each in lineage.parents),
        f"| data | {_data(lineage.data)} |",
        f"| {'weights' if full else 'DoRA' if config.get('use_dora') else 'LoRA'} | {how} |",
        *_settings(lineage.config, lineage.seed),
        f"| trained | {lineage.created}, {lineage.seconds:.0f} s, in {lineage.config.get('dtype')} |",
        f"| with | {libraries} |",
        "",
        *_measured(_object(folder / METRICS)),
        *_evaluated(name, results),
        *(
            _loading_whole(lineage.kind == "reward")
            if full
            else _loading(name, base, lineage.kind == "reward", int(config.get("r") or 0), rows=rows)
        ),
    ]
    text = "\n".join(body).rstrip() + "\n"
    return (
        _front(lineage.kind, base, lineage.data, full=full)
        + f"<!-- written by preftune {_hash(text)}: {_KEPT} -->\n"
        + text
    )


_KEPT = "what you change in here is kept"


def _is_ours(text: str) -> bool:
    found = _MARK.search(text)
    return found is not None and _hash(text[found.end() :]) == found[1]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _front(kind: str, base: str, data: Mapping[str, Any], *, full: bool) -> str:
    """YAML, each value as JSON, which is YAML too."""
    keys: dict[str, Any] = {"library_name": "transformers" if full else "peft"}
    keys["tags"] = ["preftune", *([] if full else ["lora"]), kind]
    keys["pipeline_tag"] = "text-classification" if kind == "reward" else "text-generation"
    if HUB_ID.fullmatch(base):
        keys["base_model"] = base
    if datasets := [each for each in _sources(data) if HUB_ID.fullmatch(each) and "/" in each]:
        keys["datasets"] = datasets
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()) + "---\n\n"


def _portable(base: str) -> bool:
    return base.startswith(("pypi:", "random:")) or HUB_ID.fullmatch(base) is not None


def _sources(data: Mapping[str, Any]) -> list[str]:
    """Hub ids, and names of files without their folders."""
    spec = data.get("spec")
    listed = spec.get("sources") if isinstance(spec, Mapping) else None
    entries = listed if isinstance(listed, list) else [spec]
    found = [str(each.get("path")) for each in entries if isinstance(each, Mapping) and each.get("path")]
    hub = [each for each in found if HUB_ID.fullmatch(each) and not each.endswith((".jsonl", ".json", ".csv"))]
    return list(dict.fromkeys(each if each in hub else Path(each).name for each in found))


def _data(data: Mapping[str, Any]) -> str:
    named = ", ".join(f"`{each}`" for each in _sources(data)) or "not named"
    return f"{named}: {data.get('rows', '?')} rows, fingerprint `{str(data['fingerprint'])[:12]}`"


def _kind(kind: str) -> str:
    words = {"sft": "supervised fine-tuning", "reward": "a Bradley-Terry loss (a reward model)"}
    return words.get(kind, kind.upper())


def _adapter(config: Mapping[str, Any]) -> str:
    return f"r {config.get('r')}, alpha {config.get('lora_alpha')}, on {_targets(config)}"


def _targets(config: Mapping[str, Any]) -> str:
    return ", ".join(f"`{each}`" for each in sorted(config.get("target_modules") or ()))


def _settings(config: Mapping[str, Any], seed: int) -> list[str]:
    train, method = config.get("train") or {}, config.get("method") or {}
    found = {name: train[name] for name in _SHOWN if name in train}
    # a value with a slash may be a place on this machine
    found |= {
        name: each for name, each in method.items() if isinstance(each, (int, float, str)) and "/" not in str(each)
    }
    return [f"| {name} | {value} |" for name, value in {**found, "seed": seed}.items()]


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {metrics[name]:.5g} |" for name in _METRICS if isinstance(metrics.get(name), (int, float))]
    return ["## Training", "", "| metric | |", "|---|---|", *rows, ""] if rows else []


def _evaluated(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for each in results:
        if each.get("policy") != name or each.get("win_rate") is None or each.get("reference") in (None, name):
            continue
        low, high = each.get("ci_low"), each.get("ci_high")
        span = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        kl = each.get("kl")
        said = "" if kl is None else f"{kl:.3g}"
        judged = f"{each.get('judge')} | {each['reference']} | {each['win_rate']:.3f}{span}"
        rows.append(f"| {judged} | {each['n']} | {said} |")
    if not rows:
        return []
    head = ["| judge | against | win-rate [95% interval] | n | KL, nats |", "|---|---|---|---|---|"]
    return ["## Evaluation", "", *head, *rows, ""]


def _loading_whole(reward: bool) -> list[str]:
    """How to open a model of its own."""
    auto = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    code = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("FOLDER")']
    use = "`reward: {model: FOLDER}` in a stage" if reward else "`model: {base: FOLDER}`"
    return ["## How to load it", "", "```python", *code, "```", "", f"In a recipe of preftune: {use}."]


def _loading(name: str, base: str, reward: bool, rank: int, *, rows: bool) -> list[str]:
    """How to open it. rows: it has rows of single tokens, which vLLM does not take."""
    auto = "AutoPeftModelForSequenceClassification" if reward else "AutoPeftModelForCausalLM"
    more = ", num_labels=1, dtype=torch.float32" if reward else ""
    lines = ["## How to load it", ""]
    if HUB_ID.fullmatch(base):
        imports = ["import torch"] if reward else []
        code = [*imports, f"from peft import {auto}", "", f'model = {auto}.from_pretrained("FOLDER"{more})']
        lines += ["```python", *code, "```", ""]
        if not reward and rank and not rows:
            command = f"preftune export FOLDER OUT --to vllm   # writes the command of vllm serve, for rank {rank}"
            lines += ["```text", command, "```", ""]
        return lines
    lines += [
        "Its base is on no hub: `base_model_name_or_path` is a folder of the machine that it was trained on, or the",
        "base's name. preftune finds the base by `lineage.json`, wherever this folder lies:",
        "",
        "```text",
        "preftune merge FOLDER OUT              # one ordinary model",
        *(
            []
            if reward or rows
            else ["preftune export FOLDER OUT --to vllm   # the adapter, its base, and the command"]
        ),
        "```",
    ]
    return lines


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(str(file), "cannot be read", "run its stage again") from error
    return found if isinstance(found, dict) else {}
