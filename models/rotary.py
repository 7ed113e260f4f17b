"""Rotary positions whose factors depend on how long the longest row of a forward is (dynamic NTK, LongRoPE).

There a row's numbers would depend on its neighbours: rows on either side of the length at which the factors change are
computed apart (`packing.py`). And a token's state would depend on how long its row becomes: a completion that grows
past that length was drawn with other log-probs than its whole row gives (`generate.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from ..errors import UserError


@dataclass(frozen=True)
class RotaryLimit:
    """Up to `length` tokens all rows share their factors; beyond it as well (`two`), or each length has its own."""

    length: int
    two: bool

    def parts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows that may be computed together, by their numbers of tokens.

        Raises:
            UserError: a row is of a length that has factors of its own.
        """
        near = [row for row, length in enumerate(lengths) if length <= self.length]
        far = [row for row, length in enumerate(lengths) if length > self.length]
        if far and not self.two:
            self.refuse(max(lengths))
        return [rows for rows in (near, far) if rows]

    def refuse(self, tokens: int) -> NoReturn:
        """Raises UserError: so many tokens have no numbers that another length would not change."""
        raise UserError(
            "model.base",
            f"its rotary factors change with every token past {self.length} (dynamic NTK), and a row has {tokens}: "
            "each longer row would give its first tokens other log-probs",
            f"keep rows within {self.length} tokens (max_length, max_prompt_length, max_new_tokens)",
        )


def rotary_limit(model: nn.Module) -> RotaryLimit | None:
    """The length at which this model's rotary factors change; None where they do not."""
    found: list[RotaryLimit] = []
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and "dynamic" in kind:
                length: Any = module.original_max_seq_len
                found.append(RotaryLimit(int(length), False))
            elif kind == "longrope" and (length := _length(module, layer)):
                found.append(RotaryLimit(length, True))
    if not found:
        return None
    return RotaryLimit(min(each.length for each in found), all(each.two for each in found))


def forget_lengths(model: nn.Module) -> None:
    """Factors that a long row left behind go: the next row is computed as in a model that has seen none."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or "dynamic" not in kind:
                continue
            prefix = "" if layer is None else f"{layer}_"
            first: Any = getattr(module, f"{prefix}original_inv_freq")
            held: Any = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", first.to(held.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _length(module: nn.Module, layer: str | None) -> int | None:
    """What the rotary parameters say of the length at which they change."""
    parameters: Any = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if layer is not None:
        parameters = parameters.get(layer) or {}
    found = parameters.get("original_max_position_embeddings")
    return None if found is None else int(found)
