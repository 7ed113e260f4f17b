"""The frozen base divided among the processes of a run: each holds a share of every decoder layer, and whole adapters.

Only what never changes is divided (PyTorch's FSDP2, Zhao et al., arXiv 2304.11277), so what trains stays ordinary
tensors: adapters are saved, hashed, resumed and reduced as in one process. Embeddings, norms and the head stay whole.
The decoder is the root, because everything here calls the base through it.
"""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError

logger = logging.getLogger(__name__)

SHARD_BASE = "PREFTUNE_SHARD_BASE"
"""Set in the environment of a launched process whose base is to be divided."""


def shards_base() -> bool:
    """Whether this process is one of several among which the base is to be divided."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return os.environ.get(SHARD_BASE) == "1" and several and torch.distributed.get_world_size() > 1


def shard_base(decoder: PreTrainedModel) -> None:
    """Divide the decoder's layers. Before adapters are added: what is added later is not divided.

    Raises:
        UserError: its layers do not stand where they can be found, or are quantised.
    """
    from torch.distributed.fsdp import fully_shard

    parts: Any = decoder
    layers: list[nn.Module] | None = getattr(parts, "layers", None)
    if layers is None or not all(each.is_floating_point() for each in decoder.parameters()):
        what = "a quantised base" if layers is not None else f"the layers of a {type(decoder).__name__}"
        raise UserError("--launch", f"{what} cannot be divided among processes", "use --launch ddp")
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    fully_shard(decoder, ignored_params={each for each in decoder.parameters() if id(each) not in inside})
    if torch.distributed.get_rank():
        return
    here, everywhere = base_bytes_here(decoder)
    logger.warning(
        "the frozen base is divided among %d processes: this one holds %.3g of its %.3g MB",
        torch.distributed.get_world_size(), here / 1e6, everywhere / 1e6,
    )  # fmt: skip


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model's base lies in other processes."""
    return bool(_shards(model))


@contextmanager
def whole_layers(decoder: nn.Module) -> Generator[None]:
    """Within it every layer is here in full: for work of which processes do different amounts, as decoding is. All of
    them enter and leave."""
    layers: list[Any] = [each for each in _shards(decoder) if each is not decoder]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def _shards(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if hasattr(each, "set_reshard_after_forward")]


def most_of_all(device: torch.device, *counts: int) -> tuple[int, ...]:
    """The largest of each count over all processes."""
    found = torch.tensor(counts, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return tuple(found.tolist())


def base_bytes_here(model: nn.Module) -> tuple[int, int]:
    """(bytes of frozen weights that this process holds, bytes that they have in all processes together)."""
    here = everywhere = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            own: Any = parameter
            held = own.to_local() if hasattr(own, "to_local") else parameter
            here += held.numel() * held.element_size()
            everywhere += parameter.numel() * parameter.element_size()
    return here, everywhere
