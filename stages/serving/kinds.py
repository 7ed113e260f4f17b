"""Which adapters a server is not asked to load."""

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...models.served_lora import RANKS, not_served, served_rank


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """Refuse adapters that servers do not take.

    Args:
        config: as PEFT writes it.

    Raises:
        UserError: what of it they do not.
    """
    if (said := not_served(config)) is not None:
        raise UserError(
            where, f"the adapter {said}, which servers do not take", "leave rollout out, or train plain LoRA"
        )
    rank = config.get("r")
    if isinstance(rank, int) and served_rank(rank) is None:
        raise UserError(where, f"the adapter has rank {rank}, and servers end at {RANKS[-1]}", "use a smaller lora.r")
