"""What a recipe will cost, roughly, before anything runs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipes.build import ROWS, data_spec, folders, lora_values, method_values
from ..recipes.graph import order
from ..recipes.load import load_recipe
from ..recipes.schema import Recipe
from .progress import Voice

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Transformers' own defaults, for what the recipe leaves out.
_EPOCHS, _BATCH = 3.0, 8
# Passes over a row's tokens in one step, in units of 2 FLOPs a parameter and token: forward 1, backward through a
# frozen base 1 (activations only). DPO and KTO add the reference's forward; PPO sees generation, reference, reward
# and value, then policy and value in each of its epochs.
_PASSES = {"sft": 2, "reward": 2, "dpo": 3, "kto": 3}


def plan_recipe(recipe: str, overrides: Sequence[str], voice: Voice) -> None:
    """`preftune plan`: one row a stage. Numbers are estimates to about a factor of two."""
    loaded = load_recipe(recipe, overrides)
    from ..models.loading import resolve_base
    from ..models.tokens import load_tokenizer

    base = resolve_base(loaded.model.base, loaded.model.revision)
    tokenizer = load_tokenizer(base, loaded.model.chat_template)
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    weights = sum(_parameters(file) for file in base.path.glob("*.safetensors"))
    rows = [_stage(loaded, name, tokenizer, config, weights) for name in order(loaded)]
    voice.say(f"{loaded.model.base}: {weights / 1e6:.0f} M parameters")
    voice.rows(rows)


def _stage(recipe: Recipe, name: str, tokenizer: Any, config: dict[str, Any], weights: int) -> dict[str, Any]:
    stage = recipe.stages[name]
    rows, tokens, longest = _lengths(recipe, name, tokenizer)
    train, method = stage.train, method_values(stage)
    batch = train.get("per_device_train_batch_size", _BATCH)
    epochs = train.get("num_train_epochs", _EPOCHS)
    if stage.kind == "ppo":
        rollout = method.get("rollout_batch_size", 64)
        episodes = method.get("total_episodes") or rollout * math.ceil(rows * epochs / rollout)
        inner = method.get("num_ppo_epochs", 4)
        steps = episodes // rollout * inner * method.get("num_mini_batches", 1)
        longest += method.get("max_new_tokens", 64)
        seen = episodes * (tokens / max(rows, 1) + method.get("max_new_tokens", 64))
        passes = 4 + 4 * inner
    else:
        per_step = batch * train.get("gradient_accumulation_steps", 1)
        given = train.get("max_steps", -1)
        steps = given if given > 0 else math.ceil(math.ceil(rows / per_step) * epochs)
        seen = tokens * steps * per_step / max(rows, 1)
        passes = _PASSES[stage.kind]
    adapter = _adapter_parameters(config, lora_values(recipe, name)["r"])
    element = _BYTES[recipe.model.dtype]
    sides = 2 if stage.kind in ("reward", "dpo") else 1
    # the residual stream and what the backward keeps of each block: about 16 vectors of the hidden size
    activations = batch * sides * longest * config["hidden_size"] * config["num_hidden_layers"] * 16 * element
    if train.get("gradient_checkpointing"):
        activations //= 10
    return {
        "stage": name,
        "rows": rows,
        "tokens": round(seen),
        "longest": longest,
        "steps": steps,
        "trained parameters": adapter,
        "PFLOP": 2 * weights * seen * passes / 1e15,
        "memory GB": (weights * element + adapter * 16 + activations) / 1e9,
    }


def _lengths(recipe: Recipe, name: str, tokenizer: Any) -> tuple[int, int, int]:
    """(rows, tokens in all, the longest row's tokens) of a stage's data."""
    from ..data.load import load_rows
    from .validate import encode_rows

    stage = recipe.stages[name]
    spec, kind = data_spec(recipe.data[stage.data], recipe.seed), ROWS[stage.kind]
    loaded = load_rows(spec, kind, folders(recipe))  # type: ignore[arg-type]
    encoded, _ = encode_rows(kind, loaded.rows, tokenizer, spec)
    columns = [key for key in encoded.column_names if key.endswith("_ids")]
    lengths = [sum(len(row[key]) for key in columns) for row in encoded]
    if "chosen_ids" in columns:
        # both sides carry the prompt
        lengths = [length + len(row["prompt_ids"]) for length, row in zip(lengths, encoded, strict=True)]
    return len(lengths), sum(lengths), max(lengths, default=0)


def _parameters(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _adapter_parameters(config: dict[str, Any], rank: int) -> int:
    """LoRA on every linear map of a Llama-like block: r * (inputs + outputs) each."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    inner = config.get("intermediate_size") or 4 * hidden
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    block = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return rank * layers * block
