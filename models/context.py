"""Rows against the length that the base can read."""

from typing import Any

from ..errors import UserError
from .auto import open_config
from .base import Base


def context_length(base: Base) -> int | None:
    """How many positions the base was made for; None where its config names no limit (ALiBi, state-space models)."""
    config = open_config(base.path).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(config, "alibi", False):
        return None
    # Some configs give the length before it was stretched, and by how much.
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    stretched = factor * rope.get("original_max_position_embeddings", limit) if isinstance(factor, int | float) else 0
    return max(limit, int(stretched))


def check_context(dataset: Any, base: Base, where: str, new_tokens: int = 0) -> None:
    """Refuse rows that are longer than the base's context.

    Past its last position a model with learned positions fails, and one with rotary positions goes on in silence with
    what it was never trained for.

    Args:
        dataset: encoded rows of any kind.
        where: the data's place, for the message.
        new_tokens: what is sampled after a prompt.

    Raises:
        UserError: how many rows are too long, and the longest.
    """
    limit = context_length(base)
    if limit is None:
        return
    lengths = [length + new_tokens for length in _lengths(dataset)]
    long = [length for length in lengths if length > limit]
    if not long:
        return
    with_reply = f" with {new_tokens} new tokens" if new_tokens else ""
    raise UserError(
        where,
        f"{len(long)} of {len(lengths)} rows are longer{with_reply} than the base's context of {limit} positions "
        f"(the longest: {max(long)} tokens)",
        f"set {'max_prompt_length' if new_tokens else 'max_length'}: {max(1, limit - new_tokens)}",
    )


def _lengths(dataset: Any) -> list[int]:
    columns = set(dataset.column_names)
    if "input_ids" in columns:
        return [len(ids) for ids in dataset["input_ids"]]
    prompts = [len(ids) for ids in dataset["prompt_ids"]]
    replies = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns]
    longest = [max(map(len, row)) for row in zip(*(dataset[name] for name in replies), strict=True)] if replies else []
    return [a + b for a, b in zip(prompts, longest or [0] * len(prompts), strict=True)]
