"""Tensors in full, whatever divides them among the processes of a run.

FSDP2 keeps a share of each tensor (a `DTensor`), DeepSpeed's ZeRO-3 nothing of one that is not needed at the moment
(its shape is (0,), and it has a `ds_id`). What writes weights asks here first.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import UserError
from . import seams

SHARD_BASE = "PREFTUNE_SHARD_BASE"
"""Set in the environment of a launched process whose base is to be divided (`sharded.py`). It stands here because a
launcher, which says so, should not have to import transformers."""


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in full. Gathering is collective: where some are divided, every process must call this, with all of them
    in the same order."""
    if any(hasattr(each, "ds_id") for each in tensors.values()):
        import deepspeed  # pyright: ignore[reportMissingImports]: a library of the user's

        zero: Any = deepspeed.zero
        with zero.GatheredParameters([each for each in tensors.values() if hasattr(each, "ds_id")]):
            return {name: each.detach().clone() for name, each in tensors.items()}
    found: dict[str, Any] = dict(tensors)
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in found.items()}


def check_whole(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to write tensors that are not all here: whoever reads them would find less than was trained.

    Raises:
        UserError: one is empty or has no values.
    """
    for name, tensor in tensors.items():
        if not tensor.numel() or tensor.is_meta or hasattr(tensor, "full_tensor"):
            held = "values" if tensor.numel() and tensor.is_meta else f"all of it (shape {tuple(tensor.shape)})"
            problem = f"{name} is divided among processes, and this one does not hold {held}: nothing is saved"
            raise UserError(where, problem, "launch with distributed_type MULTI_GPU or MULTI_CPU")


def check_undivided() -> None:
    """Refuse a quantised base where DeepSpeed divides the weights.

    Raises:
        UserError: it does (ZeRO-3).
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        said = "ZeRO-3 divides the base's weights, and cannot divide packed ones"
        raise UserError("model.quantization", said, "use --launch fsdp2, ddp or zero2")


@contextmanager
def loading_whole() -> Generator[None]:
    """Within it transformers loads a model in full, and leaves it to the engine to divide it later (ZeRO-3): before, it
    is tried, and its adapters are made."""
    from transformers.integrations import deepspeed as integration

    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    seams.require(seams.ZERO3)
    own: Any = integration
    held = own._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(held)
