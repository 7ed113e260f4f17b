"""Which adapters a server of LoRA (vLLM, SGLang) takes, and computes as PEFT does. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes (vLLM 0.27 to 0.32)."""


def not_served(config: Mapping[str, Any]) -> str | None:
    """What of an adapter a server refuses, or reads otherwise than PEFT, in words that follow "the adapter"; None where
    there is nothing.

    Args:
        config: what `adapter_config.json` holds.
    """
    refused = {
        f"is no LoRA but {config.get('peft_type')}": config.get("peft_type", "LORA") != "LORA",
        "is a DoRA": config.get("use_dora"),
        f"trains whole modules ({', '.join(config.get('modules_to_save') or ())})": config.get("modules_to_save"),
        "trains biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        # read by some versions, passed over by others
        "has ranks or scalings of its own by layer": config.get("rank_pattern") or config.get("alpha_pattern"),
        "trains stacked weights (target_parameters)": config.get("target_parameters"),
        "trains rows of single tokens (trainable_token_indices)": config.get("trainable_token_indices"),
    }
    return next((said for said, found in refused.items() if found), None)


def served_rank(rank: int) -> int | None:
    """What `--max-lora-rank` is to say for an adapter of that rank; None where there is nothing that would do."""
    return next((each for each in RANKS if each >= rank), None)
