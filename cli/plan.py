"""What a recipe will cost, roughly, before anything runs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..recipes.build import data_spec, folders, lora_spec
from ..recipes.graph import order
from ..recipes.load import load_recipe
from ..recipes.schema import Recipe
from .output import Output

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Transformers' own defaults, for what the recipe leaves out.
_EPOCHS, _BATCH = 3.0, 8


def plan_recipe(recipe: str, overrides: Sequence[str], output: Output) -> None:
    """`preftune plan`: print one row per stage. The numbers are estimates, to within about a factor of two."""
    loaded = load_recipe(recipe, overrides)
    from ..models.auto import open_config
    from ..models.cost import parameters_in
    from ..models.loading import resolve_base
    from ..models.tokens import load_tokenizer

    base = resolve_base(loaded.model.base, loaded.model.revision)
    tokenizer = load_tokenizer(base, loaded.model.chat_template, loaded.model.template_date)
    config = open_config(base.path)
    weights = parameters_in(base.path.glob("*.safetensors"))
    rows = [_stage(loaded, name, tokenizer, config, weights) for name in order(loaded)]
    output.say(f"{loaded.model.base}: {weights / 1e6:.0f} M parameters")
    output.rows(rows)


def _stage(
    recipe: Recipe, name: str, tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", weights: int
) -> dict[str, Any]:
    """The plan's row for a stage.

    Args:
        weights: parameters of the base.
    """
    from ..models.cost import activation_bytes, adapter_parameters, training_bytes, training_flops, weight_bytes

    stage = recipe.stages[name]
    rows, tokens, longest = _lengths(recipe, name, tokenizer)
    train, kind = stage.train, stage.record
    batch = train.get("per_device_train_batch_size", _BATCH)
    epochs = train.get("num_train_epochs", _EPOCHS)
    if (on_policy := kind.on_policy) is not None:
        method = {each.name: each.default for each in kind.parameters} | stage.method()
        rollout, longest_reply = method["rollout_batch_size"], method["max_new_tokens"]
        each = method[on_policy.epochs] * method[on_policy.mini_batches]
        episodes = method["total_episodes"] or rollout * math.ceil(rows * epochs / rollout)
        if (given := train.get("max_steps", -1)) > 0:
            episodes = given // each * rollout
        steps = episodes // rollout * each
        longest += longest_reply
        seen = episodes * (tokens / max(rows, 1) + longest_reply)
        passes = on_policy.rollout_passes + on_policy.epoch_passes * method[on_policy.epochs]
    else:
        per_step = batch * train.get("gradient_accumulation_steps", 1)
        given = train.get("max_steps", -1)
        steps = given if given > 0 else math.ceil(math.ceil(rows / per_step) * epochs)
        seen = tokens * steps * per_step / max(rows, 1)
        passes = kind.passes
    adapter = adapter_parameters(config, lora_spec(recipe, name))
    activations = activation_bytes(
        rows=batch * (2 if kind.rows == "pair" else 1),
        tokens=longest,
        hidden_size=config.get_text_config().hidden_size,
        layers=config.get_text_config().num_hidden_layers,
        dtype=recipe.model.dtype,
        gradient_checkpointing=bool(train.get("gradient_checkpointing")),
    )
    base = weight_bytes(config, weights, recipe.model.dtype, recipe.model.quantization)
    memory = training_bytes(base=base, adapter=adapter, activations=activations)
    return {
        "stage": name,
        "from": stage.parent,
        "rows": rows,
        "tokens": round(seen),
        "longest": longest,
        "steps": steps,
        "trained parameters": adapter,
        "PFLOP": training_flops(weights, seen, passes) / 1e15,
        "memory GB": memory / 1e9,
    }


def _lengths(recipe: Recipe, name: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int, int]:
    """(rows, tokens in all, the longest row's tokens) of a stage's data."""
    from ..data.encode import encode_rows
    from ..data.load import load_rows

    stage = recipe.stages[name]
    spec, kind = data_spec(recipe.data[stage.data], recipe.seed), stage.record.rows
    loaded = load_rows(spec, kind, folders(recipe))
    encoded, _ = encode_rows(kind, loaded.rows, tokenizer, spec)
    columns = [key for key in encoded.column_names if key.endswith("_ids")]
    # both sides of a pair carry the prompt
    columns += ["prompt_ids"] if "chosen_ids" in columns else []
    lengths = [sum(map(len, parts)) for parts in zip(*(encoded[key] for key in columns), strict=True)]
    return len(lengths), sum(lengths), max(lengths, default=0)
