"""The one check that every adapter and every `LoraConfig` goes through before it is used.

What we compute with LoRA weights (roles on one base, merged rollouts, log-probs, exact copies) is W + scaling * B @ A
on the linear layers of the decoder, the base's own weights untouched, and rows of single tokens in the embedding and in
the head, in the place of the base's. Whatever else PEFT can do is refused in words, by
what is allowed and not by what is forbidden: a field that a newer PEFT adds is refused until somebody has looked at it.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError, nearest
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_regular
from ..intact import check_intact
from . import seams
from .altering import check_start
from .token_rows import ROWS

with seams.importing(seams.TOKEN_ROWS):
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
with seams.importing(seams.LORA_LAYER):
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
with seams.importing(seams.CONV1D):
    from transformers.pytorch_utils import Conv1D

# Which layers, how large and how strong: what we do with it is exact (tests/models/test_plain_lora.py).
_OBEYED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "use_dora", "rank_pattern", "alpha_pattern", "target_parameters"),
    "trainable_token_indices",
}
# What is looked at below, or says nothing about the numbers: who made it, settings of what is not switched on.
_ELSEWHERE = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "init_lora_weights", "modules_to_save"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size"),
}
# Ways to start that leave the base's own weights where they are. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) write
# into the base, which is everybody's here; MiCA holds B still, which nothing here would do.
_KIND_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)
_HEADS = ("score", "classifier")

_MERGE = "merge it into its base (preftune merge ADAPTER OUT) and start from the result: model.base: OUT"
_UNMOVE = (
    "save it as plain LoRA, with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), or merge "
    "it into its base (preftune merge ADAPTER OUT) and start from the result: model.base: OUT"
)


def check_plain(config: PeftConfig, where: str, *, fresh: bool = False) -> LoraConfig:
    """The same config, if it is plain LoRA.

    Args:
        where: the place that the config came from, for messages.
        fresh: no adapter of it exists yet: it is asked for, and has to start as the base.

    Raises:
        UserError: another kind of adapter, or a field that would make it more than plain LoRA.
    """
    remedy = "use a plain LoraConfig" if fresh else _MERGE
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(where, f"a {kind} adapter, expected plain LoRA", remedy)
    plain = LoraConfig()
    allowed = _OBEYED | _ELSEWHERE
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in allowed or value == getattr(plain, field.name) or not (value or value == 0):
            continue
        raise UserError(where, f"not plain LoRA ({field.name}={_short(value)})", remedy)
    start = config.init_lora_weights
    if not fresh and start not in _KIND_STARTS:
        problem = f"not plain LoRA (init_lora_weights={start!r} writes into the base, which every role shares)"
        raise UserError(where, problem, _UNMOVE)
    if fresh:
        check_start(start, (config.r, *(config.rank_pattern or {}).values()))
    heads = _HEADS if config.task_type == "SEQ_CLS" else ()
    others = [name for name in config.modules_to_save or () if name not in heads]
    if others:
        raise UserError(where, f"not plain LoRA (modules_to_save={_short(others)})", remedy)
    return config


def read_config(folder: Path) -> PeftConfig:
    """The config that a saved adapter carries.

    Raises:
        UserError: unreadable, of a kind that PEFT does not know, or with a field that this PEFT would pass over.
    """
    file = folder / ADAPTER_CONFIG
    try:
        raw: dict[str, Any] = json.loads(read_regular(file))
        with warnings.catch_warnings():
            # of fields that it does not know, which are looked at below
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            str(file), f"no adapter config that PEFT can read ({said})", "save the adapter again"
        ) from error
    known = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(name for name, value in raw.items() if name not in known and value)
    if unknown:
        remedy = "update PEFT, or merge the adapter into its base where it was trained"
        raise UserError(str(file), f"{unknown[0]}={_short(raw[unknown[0]])} is nothing that this PEFT knows", remedy)
    return config


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A saved adapter's config and tensors (on the CPU).

    Raises:
        UserError: no PEFT adapter there, not in safetensors, not plain LoRA (see `check_plain`), damaged, or weights
            that are no finite numbers.
    """
    where = str(folder)
    check_intact(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(where, f"no {name} there", "give a folder that a stage or PEFT's save_pretrained wrote")
    config = check_plain(read_config(folder), where)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    check_tensors(tensors, where)
    return config, tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, on the CPU. Raises UserError where it cannot be read."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(str(file), f"cannot be read ({said})", "run its stage again, or take it from a copy") from error


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Every weight is a finite number, and belongs to LoRA, to rows of single tokens or to a classifier's `score`.

    Raises:
        UserError: one is not; its name is said.
    """
    for name, tensor in tensors.items():
        if ".lora_" not in name and not name.endswith((".score.weight", ".score.bias", f".{ROWS}")):
            # PEFT saves embeddings that have grown with the vocabulary, unasked
            raise UserError(where, f"it brings whole weights ({name}) besides LoRA", _MERGE)
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                where, f"{name} holds NaN or infinite weights", "train it again, with a lower learning rate"
            )


def adapted_modules(tensors: Iterable[str]) -> list[str]:
    """The paths of the modules that a saved adapter changes, from its tensors' names."""
    names = (name.removeprefix("base_model.model.") for name in tensors if ".lora_" in name)
    return sorted({name.partition(".lora_")[0] for name in names})


def target_names(
    model: PreTrainedModel, config: LoraConfig, where: str = "peft_config.target_modules"
) -> str | list[str]:
    """The modules of `model` that a config asks for, as a list of names that says the same to any version of PEFT.

    A regular expression, excluded modules, single layers and PEFT's own choice for the architecture become names: the
    last components where these say exactly as much, whole paths otherwise. "all-linear" stays what it is.

    Raises:
        UserError: they match nothing, or PEFT has no choice for this architecture.
    """
    wanted = config.target_modules
    if wanted is None and config.target_parameters:
        said = "none given beside target_parameters, which PEFT takes for no linear layer at all"
        raise UserError(where, said, "name the linear layers that get an adapter too")
    if wanted is None:
        wanted = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if wanted is None:
            raise UserError(where, f"none given, and PEFT has no choice for {model.config.model_type}", "name them")
    narrowed = bool(config.exclude_modules) or config.layers_to_transform is not None
    if isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear":
        if not narrowed:
            return "all-linear"
        wanted = {path for path, _ in _linear(model)}
    if not isinstance(wanted, str) and not narrowed:
        return sorted(wanted)
    asked = dataclasses.replace(config, target_modules=wanted)
    chosen = [path for path, _ in model.named_modules() if path and check_target_module_exists(asked, path)]
    if not chosen:
        raise UserError(where, f"{_short(wanted)} matches no module of {type(model).__name__}", "name linear layers")
    last = {path.rpartition(".")[2] for path in chosen}
    every = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in last}
    return sorted(last if every == set(chosen) else chosen)


def check_targets(model: PreTrainedModel, names: Iterable[str], where: str = "lora.target_modules") -> None:
    """Each of these names stands for linear layers of the decoder, and for nothing else.

    Args:
        model: without adapters.
        names: last components of paths (`q_proj`), longer ends of them, or whole paths.

    Raises:
        UserError: a name that matches nothing, an embedding, the output head, or a module that is no linear layer.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    decoder = {id(module) for module in model.base_model.modules()}
    alone = model.base_model is model
    for name in names:
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            known = sorted({path.rpartition(".")[2] for path, _ in _linear(model)})
            raise UserError(
                where, f"{name!r} matches no module of {type(model).__name__}", nearest(name, known, most=12)
            )
        for path in found:
            module = modules[path]
            if isinstance(module, nn.Embedding) or not (alone or id(module) in decoder):
                what = "the embedding" if isinstance(module, nn.Embedding) else "outside of the decoder"
                remedy = "leave it out: rollouts and log-probs run through the base's own embedding and head"
                raise UserError(where, f"{name!r} is {what} ({path})", remedy)
            if not isinstance(module, (nn.Linear, Conv1D, nn.Conv1d)):
                remedy = "name linear layers, such as q_proj, or write all-linear"
                raise UserError(where, f"{name!r} is a {type(module).__name__}, no linear layer ({path})", remedy)


def check_layers(model: nn.Module, layers: Mapping[str, BaseTunerLayer], where: str) -> None:
    """No layer that carries adapters is an embedding or the output head, and none is merged at the moment.

    Args:
        model: the causal model or classifier, its layers wrapped by PEFT.
        layers: every layer with adapters, by its name.

    Raises:
        UserError: one is.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, layer in layers.items():
        rows = isinstance(layer, TrainableTokensLayer)
        if not rows and (layer is head or isinstance(layer.get_base_layer(), nn.Embedding)):
            what = "the output head" if layer is head else "an embedding"
            raise UserError(where, f"LoRA on {what} ({name}), which rollouts and log-probs would leave out", _MERGE)
        if getattr(layer, "merged", False):
            raise UserError(where, f"its adapter is merged into {name}", "call unmerge_adapter() first")


def _linear(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _short(value: object) -> str:
    text = repr(sorted(value, key=str)) if isinstance(value, set) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
