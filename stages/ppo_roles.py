"""Who is who on the one base: the reference, the value, and which parameters train."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..models.adapters import DEFAULT, REF, REWARD, VALUE, AdapterSet
from .rewards import RewardSource
from .scorers import Scorer


class ValueStart(NamedTuple):
    """The value starts as weight * (score - mean) / std of the reward adapter `role`."""

    role: str
    mean: float
    std: float
    weight: float


def add_reference(adapters: AdapterSet) -> bool:
    """Freeze a copy of the policy as "ref". An `AdapterSet` that brings a "ref" keeps it; then False is returned."""
    if REF in adapters.names:
        return False
    adapters.copy(REF, source=DEFAULT, trainable=False)
    return True


def value_start(
    sources: Sequence[RewardSource], scorers: Sequence[Scorer], *, centre: bool, rescale: bool, weighted: bool
) -> ValueStart | None:
    """What the value starts from: the first reward stage; None when no source is one.

    Args:
        centre: scores have the reference mean subtracted. rescale: they are divided by the lineage's std.
        weighted: they are summed with their weights (an ensemble's are not).
    """
    for source, scorer in zip(sources, scorers, strict=True):
        if source.kind == "stage":
            mean, std = scorer.normal if scorer.normal is not None and centre else (0.0, 1.0)
            return ValueStart(REWARD, mean, std if rescale else 1.0, source.weight if weighted else 1.0)
    return None


def add_value(adapters: AdapterSet, *, shared: bool, start: ValueStart | None) -> None:
    """Give the adapters a value function: adapter "value" (none when shared) and head "value", both trainable.

    Args:
        shared: the head stands on the policy's own trunk, and starts at zero.
        start: the reward that the value starts from: head and bias are set so that at a response's last token the
            value is the normalised score. None: a copy of the policy with a zero head.
    """
    if VALUE in adapters.names:
        return
    if shared or start is None:
        if not shared:
            adapters.copy(VALUE, source=DEFAULT, trainable=True)
        adapters.add_head(VALUE, bias=True, zero=True)
        return
    adapters.copy(VALUE, source=start.role, trainable=True)
    source = adapters.heads[start.role].score
    head = adapters.add_head(VALUE, bias=True, zero=True).score
    with torch.no_grad():
        head.weight.copy_(source.weight * (start.weight / start.std))
        head.bias.fill_(-start.mean * start.weight / start.std)


def trainable_parameters(adapters: AdapterSet, *, shared: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(policy's, value's) parameters, the value's head among the latter."""
    policy = adapters.parameters(DEFAULT)
    value = list(adapters.heads[VALUE].parameters()) if shared else adapters.parameters(VALUE)
    for parameter in (*policy, *value):
        if not parameter.requires_grad:
            raise ValueError("a parameter of the policy or the value is frozen, expected all of them to train")
    return policy, value
