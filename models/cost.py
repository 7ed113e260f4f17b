"""What a model costs before anything runs, from its config alone: parameters, bytes and FLOPs.

Everything is counted in the real model and the real LoRA on torch's meta device, so it holds for every architecture and
every choice of target modules. What a step holds beside its weights is rehearsed (`rehearsal.py`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedConfig

from .causal import decoder_of
from .lora import LoraSpec, adapted_weight, check_stacked, refused_by_peft
from .quiet import quiet_transformers
from .rehearsal import BYTES_QUANTISED, quantised_layers, skeleton

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number of that dtype."""

ADAPTER_BYTES = 4
"""Of an adapter's parameter, and of its gradient: fp32, whatever the base has."""

_STATES = {"ademamix": 3, "sgd": 0, "lion": 1, "adagrad": 1, "rmsprop": 1}
"""Numbers that optimisers keep of a parameter, by a word of transformers' names; AdamW, and what is not here: two."""
_NARROW = {"8bit": 1.0, "4bit": 0.5}


def optimiser_bytes(optim: str) -> float:
    """Bytes of an optimiser's state for one trained parameter, by its name in transformers: fp32 or what that says."""
    if "adafactor" in optim:
        return 1  # a number a row and a column of each matrix
    states = next((count for word, count in _STATES.items() if word in optim), 2)
    return states * next((size for word, size in _NARROW.items() if word in optim), 4.0)


def is_paged(optim: str) -> bool:
    """Whether the optimiser's state leaves the GPU for the machine's memory where there is no room for it
    (arXiv 2305.14314, section 3, Paged Optimizers)."""
    return "paged" in optim


@dataclass(frozen=True)
class Sizes:
    """What does not depend on the rows.

    Attributes:
        parameters: of the base, tied ones once.
        decoder: of them, those of the decoder's layers: what a token is multiplied with.
        head: those of the output head: what a token with a loss is multiplied with.
        weight_bytes: of the base as it lies in memory.
        largest_layer_bytes: of one decoder layer, as it lies in memory.
        adapter: parameters of one adapter.
        adapted_bytes, linear_bytes: of the weights that the adapter changes, and of all linear layers and the head.
        kv_bytes: of one token's keys and values in all layers.
        products: that a step's linear layers are made of, each of another shape: of each weight's own two (forward,
            gradient), of each input's width and of each output's three (LoRA's, and their gradients).
        vocabulary, hidden, layers: of the model.
    """

    parameters: int
    decoder: int
    head: int
    weight_bytes: int
    largest_layer_bytes: int
    adapter: int
    adapted_bytes: int
    linear_bytes: int
    kv_bytes: int
    products: int
    vocabulary: int
    hidden: int
    layers: int


_COUNTED: dict[tuple[str, ...], Sizes] = {}


def sizes(config: PreTrainedConfig, lora: LoraSpec, dtype: str, quantization: str | None = None) -> Sizes:
    """Count a model of that architecture with an adapter; once in a process."""
    key = (config.to_json_string(use_diff=False), repr(lora), dtype, str(quantization))
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, lora, dtype, quantization)
    return _COUNTED[key]


def _count(config: PreTrainedConfig, lora: LoraSpec, dtype: str, quantization: str | None) -> Sizes:
    unit, text = BYTES[dtype], config.get_text_config()
    model = skeleton(config, getattr(torch, dtype), None)
    parameters = {id(each): each.numel() for each in model.parameters()}
    small = {id(linear.weight) for _, _, linear in quantised_layers(model)} if quantization else set[int]()
    packed = BYTES_QUANTISED[quantization] if quantization else unit

    def held(part: Any) -> float:
        unique: dict[int, int] = {id(each): each.numel() for each in part.parameters()}
        return sum(count * (packed if key in small else unit) for key, count in unique.items())

    head: Any = model.get_output_embeddings()
    linear: int = sum(each.weight.numel() for _, _, each in quantised_layers(model)) + int(head.weight.numel())
    decoder = decoder_of(model)
    layers = decoder_layers(decoder)
    embedding = {id(each) for each in model.get_input_embeddings().parameters()} | {id(head.weight)}
    found = {
        "parameters": sum(parameters.values()),
        "decoder": sum(count for key, count in parameters.items() if key not in embedding),
        "head": head.weight.numel(),
        "weight_bytes": round(held(model)),
        "largest_layer_bytes": round(max(map(held, layers), default=0)),
        "linear_bytes": linear * unit,
        "kv_bytes": kv_bytes(config, unit),
    }
    with torch.device("meta"), quiet_transformers(), refused_by_peft():
        # a start that is drawn costs time, and is as large as any
        settings = lora.config(model, "CAUSAL_LM", continued=True)
        adapted = PeftModelForCausalLM(model, settings)
    check_stacked(settings, lora)
    changed: list[Any] = [adapted_weight(each) for each in adapted.modules() if isinstance(each, LoraLayer)]
    # of stacked experts one is multiplied with at a time
    shapes = {tuple(each.shape[-2:]) for each in changed}
    return Sizes(
        **found,
        adapter=sum(each.numel() for each in adapted.parameters() if each.requires_grad),
        adapted_bytes=sum(each.numel() for each in changed) * unit,
        products=2 * len(shapes) + 3 * sum(len({shape[side] for shape in shapes}) for side in (0, -1)),
        vocabulary=head.weight.shape[0],
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
    )


def decoder_layers(decoder: Any) -> list[Any]:
    """The layers of a decoder: its longest list of modules."""
    lists = [list(each) for each in decoder.modules() if isinstance(each, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def kv_bytes(config: PreTrainedConfig, unit: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * unit


def rows_at_once(config: PreTrainedConfig, unit: int, columns: int) -> int:
    """How many rows of so many tokens a CPU decodes at once where nobody says it.

    A step reads the weights once for all of them, so more are faster, as long as their keys and values are small beside
    the weights: 128 then, else what 2 GiB hold, and never below 32. It goes by the model alone: the same on every CPU.
    """
    return max(32, min(128, 2**31 // max(1, columns * kv_bytes(config, unit))))


def adapter_parameters(config: PreTrainedConfig, lora: LoraSpec) -> int:
    """Weights of a LoRA adapter for a model of that architecture: r * (inputs + outputs) a linear layer."""
    return sizes(config, lora, "float32").adapter


def training_flops(found: Sizes, tokens: float, passes: float, scored: float = 0, head_passes: float = 0) -> float:
    """FLOPs of taking tokens through a model: 2 a parameter, token and pass (arXiv 2001.08361), without attention.

    Args:
        tokens, passes: through the decoder. A forward is one pass; the backward through a frozen model, which only
            carries gradients to the adapter's layers, is another one.
        scored, head_passes: tokens that go through the LM head, and how often.
    """
    return 2 * found.decoder * tokens * passes + 2 * found.head * scored * head_passes


def activation_bytes(found: Sizes, tokens: int, unit: int, *, checkpointing: bool) -> int:
    """By a rule of thumb, for a model that cannot be rehearsed: what the forward keeps of `tokens` for the backward.

    Sixteen vectors of the hidden size a token and layer; with checkpointing one of them, and one layer's in full.
    """
    vector = tokens * found.hidden * unit
    return vector * (found.layers + 16) if checkpointing else vector * found.layers * 16


def total(parts: Iterable[Counter[str]]) -> Counter[str]:
    """Bytes by part, added up."""
    added: Counter[str] = Counter()
    for each in parts:
        added.update(each)
    return added
