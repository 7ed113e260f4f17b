"""An adapter for a value model of another program: a token classifier with one label, LoRA and a head that both train.

Made from the base's config and a reward adapter's head alone: no weight of the base is read.
"""

import math
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from ..errors import UserError
from ..files import ADAPTER_WEIGHTS
from .auto import open_config
from .lora import LoraSpec
from .quiet import quiet_transformers


def write_value_adapter(
    base: Path, out: Path, lora: LoraSpec, head: Tensor | None, bias: float, seed: int
) -> list[str]:
    """Write the adapter, whose LoRA changes nothing yet; returns the names of the modules that it adapts.

    Args:
        base: the folder of a model, of which the config is read.
        head: the head's weights [1, hidden]; None: zeros.
        bias: the head's; where the architecture has one.

    Raises:
        UserError: the architecture has no token classifier, or the head is not for it.
    """
    config = open_config(base)
    config.num_labels = 1
    with torch.device("meta"), quiet_transformers():
        try:
            model = AutoModelForTokenClassification.from_config(config)
        except ValueError as error:
            said = f"a {config.model_type} has no token classifier, which a value model is"
            raise UserError("model.base", said, "train it here") from error
        settings = lora.config(model, "TOKEN_CLS", continued=True)
        peft: Any = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, empty in get_peft_model_state_dict(peft).items():
        if "lora_A" in name:  # as PEFT draws it
            drawn = torch.empty(empty.shape)
            made[name] = nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        elif "lora_B" in name:
            made[name] = torch.zeros(empty.shape)
        elif empty.dim() == 1:
            made[name] = torch.full(empty.shape, bias)
        else:
            made[name] = torch.zeros(empty.shape) if head is None else head.float().reshape(empty.shape).clone()
    peft.peft_config["default"].inference_mode = True
    peft.peft_config["default"].save_pretrained(str(out))
    save_file(made, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return sorted(settings.target_modules or ())


def reward_head(adapter: Path) -> Tensor:
    """The head's weights [1, hidden] of a reward adapter, fp32."""
    with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        (name,) = [each for each in file.keys() if each.endswith("score.weight")]  # noqa: SIM118
        return file.get_tensor(name).float()
