"""The frozen base divided among the processes of a run: each holds a share of every decoder layer, and whole adapters.

Only what never changes is divided (PyTorch's FSDP2, Zhao et al., arXiv 2304.11277), so what trains stays ordinary
tensors: adapters are saved, hashed, resumed and reduced as in one process. The decoder is the root, because everything
here calls the base through it. Embedding and head, often one table and read beside their modules too, are divided by
rows and gathered where they are read. What lies between (norms, scalar heads) stays whole.
"""

import logging
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from . import seams
from .quantised import QuantisedLinear
from .whole import SHARD_BASE

logger = logging.getLogger(__name__)


def shards_base() -> bool:
    """Whether this process is one of several among which the base is to be divided."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return os.environ.get(SHARD_BASE) == "1" and several and torch.distributed.get_world_size() > 1


def shard_base(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Divide the decoder's layers and the model's vocabulary tables. Before adapters are added: what is added later is
    not divided.

    Raises:
        UserError: its layers do not stand where they can be found, or hold weights that are packed in another way than
            ours (`quantised`).
    """
    from torch.distributed.fsdp import fully_shard

    parts: Any = decoder
    layers: list[nn.Module] | None = getattr(parts, "layers", None)
    packed = {id(each) for part in decoder.modules() if isinstance(part, QuantisedLinear) for each in part.parameters()}
    odd = (each for each in decoder.parameters() if not (each.is_floating_point() or id(each) in packed))
    if layers is None or any(True for _ in odd):
        what = "a base that is quantised so" if layers is not None else f"the layers of a {type(decoder).__name__}"
        raise UserError("--launch", f"{what} cannot be divided among processes", "use --launch ddp")
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True)
    readers = [model.get_input_embeddings(), model.get_output_embeddings()]
    setattr(decoder, _TABLES, _divided_tables([each for each in readers if isinstance(each, _TABLE_READERS)]))
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    fully_shard(decoder, ignored_params={each for each in decoder.parameters() if id(each) not in inside})
    if torch.distributed.get_rank():
        return
    here, everywhere = base_bytes_here(decoder)
    logger.warning(
        "the frozen base is divided among %d processes: this one holds %.3g of its %.3g MB",
        torch.distributed.get_world_size(), here / 1e6, everywhere / 1e6,
    )  # fmt: skip


_TABLES = "_preftune_tables"
"""The attribute of a divided decoder under which its tables are found."""
_TABLE_READERS = (nn.Linear, nn.Embedding)


class Table:
    """A weight [V, H] of which this process holds some rows, and the modules that read it: the embedding, the head, or
    both. It is whole while one of them computes, and within `whole`."""

    def __init__(self, weight: torch.Tensor, readers: list[Any]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh(weight.device.type, (torch.distributed.get_world_size(),))
        # all hold the same: nothing is sent
        rows = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        self.share, self.readers, self.kept = nn.Parameter(rows, requires_grad=False), readers, False
        self._put(self.share)
        for reader in readers:
            reader.register_forward_pre_hook(self._before)
            reader.register_forward_hook(self._after, always_call=True)

    def _put(self, weight: nn.Parameter) -> None:
        for reader in self.readers:
            reader.weight = weight

    def _before(self, *_: object) -> None:
        if not self.kept:
            self._put(nn.Parameter(in_full(self.share), requires_grad=False))

    def _after(self, *_: object) -> None:
        if not self.kept:
            self._put(self.share)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Within it the modules hold all of it. All processes enter and leave."""
        self._before()
        self.kept = True
        try:
            yield
        finally:
            self.kept = False
            self._put(self.share)


def _divided_tables(readers: list[Any]) -> list[Table]:
    """The readers' weights, each divided once, also where two modules read one."""
    by_weight: dict[int, list[Any]] = {}
    for reader in readers:
        by_weight.setdefault(id(reader.weight), []).append(reader)
    return [Table(those[0].weight, those) for those in by_weight.values()]


def in_full(weight: torch.Tensor) -> torch.Tensor:
    """A weight with all its rows, of which this process may hold some; then every process must ask."""
    held: Any = weight
    return held.full_tensor() if hasattr(held, "full_tensor") else weight


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
    tables: list[Table] = getattr(decoder, _TABLES, [])
    hooked = [*_shards(decoder), *(reader for table in tables for reader in table.readers)]
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(table.whole())
        try:
            # nothing is left to gather, and a decoder without hooks takes the steps of one that is not divided
            with _without_hooks(hooked):
                yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()


@contextmanager
def _without_hooks(modules: list[nn.Module]) -> Generator[None]:
    seams.require(seams.MODULE_HOOKS, modules[0] if modules else nn.Identity())
    parts: list[Any] = list(modules)
    dicts = [each for module in parts for each in (module._forward_pre_hooks, module._forward_hooks)]
    before = [dict(each) for each in dicts]
    for each in dicts:
        each.clear()
    try:
        yield
    finally:
        for each, hooks in zip(dicts, before, strict=True):
            each.update(hooks)


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
