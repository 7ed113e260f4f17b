"""Whether the weights of a base are those of the model that its config describes, before any is read."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..errors import UserError
from .auto import open_config
from .quiet import quiet_transformers
from .sound import AGAIN, CONFIG, WHERE, first_line, load_whole, read_header, read_object, weight_files

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether it is of a mixture of experts: a step may not use all of them."""
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "first_k_dense_replace")
    return any(getattr(text, name, None) for name in names)


def check_config(folder: Path, spec: str) -> PreTrainedConfig:
    """The config, as transformers reads it.

    Raises:
        UserError: it cannot be read, is of a kind that transformers does not know, says less than what makes the model,
            or names another architecture than its kind's.
    """
    raw = read_object(folder / CONFIG, spec)
    if not isinstance(raw.get("model_type"), str):
        raise UserError(WHERE, f"{CONFIG} of {spec!r} has no model_type", AGAIN)
    try:
        with quiet_transformers():
            config = open_config(folder)
    except UserError:
        raise
    except Exception as error:  # a foreign file: its reader fails in every way there is
        raise UserError(WHERE, f"{CONFIG} of {spec!r} says no model ({first_line(error)})", AGAIN) from error
    # of what a config leaves out, the shapes of the weights tell all but this
    heads = {*_HEADS, type(config).attribute_map.get("num_attention_heads", "")}
    if hasattr(config, "num_attention_heads") and not raw.keys() & heads and "text_config" not in raw:
        raise UserError(WHERE, f"{CONFIG} of {spec!r} does not say num_attention_heads", AGAIN)
    _check_architecture(raw, config, spec)
    return config


def _check_architecture(raw: Mapping[str, Any], config: PreTrainedConfig, spec: str) -> None:
    named = raw.get("architectures")
    for name in named if isinstance(named, list) else ():
        theirs: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        known = getattr(theirs, "config_class", None)
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        families = {type(config), *type(config).__mro__, *(type(each) for each in vars(config).values())}
        if known is not None and known in causal and not (known in families or issubclass(known, type(config))):
            said = f"{CONFIG} of {spec!r} says model_type {config.model_type} and the architecture {name}"
            raise UserError(WHERE, said, AGAIN)


def check_complete(folder: Path, spec: str) -> None:
    """The same without reading a weight: the model is made on no device, and so are its weights.

    Raises:
        UserError: the folder's weights are not those of the model that its config says.
    """
    config, causal = check_config(folder, spec), cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)
    if getattr(config, "quantization_config", None) or type(config) not in causal:
        return  # which says itself what it needs, where it is loaded
    state = {
        name: torch.empty(entry["shape"], dtype=_TYPES.get(entry["dtype"], torch.float32), device="meta")
        for file in weight_files(folder, spec)
        for name, entry in read_header(file, spec)[1].items()
    }
    load = partial(causal[type(config)].from_pretrained, None, config=config)
    with quiet_transformers():
        load_whole(load, WHERE, spec, state_dict=state, device_map={"": "meta"}, dtype=torch.float32)
