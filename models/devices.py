"""Which of the machine's GPUs is this process' own: a process of ours uses one."""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch

logger = logging.getLogger(__name__)


def own_gpu() -> torch.device:
    """This process' GPU: under a launcher that of its local rank, as Accelerate gives them out, else the current one.

    With its index: to whoever compares devices, "cuda" is another one than "cuda:0".

    Raises:
        RuntimeError, AssertionError: there is no GPU.
    """
    rank = os.environ.get("LOCAL_RANK")
    index = torch.cuda.current_device() if rank is None else int(rank) % torch.cuda.device_count()
    return torch.device("cuda", index)


def own_device() -> torch.device:
    """This process' GPU, or the CPU where there is none."""
    return own_gpu() if torch.cuda.is_available() else torch.device("cpu")


_FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What a CPU that multiplies in bfloat16 says of itself: x86's words, then ARM's."""


def auto_dtype() -> Literal["bfloat16", "float32"]:
    """What `dtype: auto` stands for here: bfloat16 where the GPU, or without one the CPU, computes in it, else float32.

    A device that only emulates it (a V100, a T4, a CPU without instructions for it) is slower in bfloat16 than in
    float32, and no more exact.
    """
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = _capabilities()
        native = any(known.get(name) for name in _FAST_BF16)
    return "bfloat16" if native else "float32"


def device_name() -> str:
    """The device that trains here, by its maker's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(_capabilities().get("cpu_name") or "this CPU")


def _capabilities() -> Mapping[str, Any]:
    """What PyTorch says of this CPU; nothing before 2.11."""
    said = getattr(torch.cpu, "get_capabilities", None)
    return {} if said is None else said()


@functools.cache  # once a process
def say_unused_gpus() -> None:
    """Where more GPUs are visible than this process uses and no other process uses them: how to use them all."""
    visible, processes = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1"))
    if visible > 1 and processes == 1:
        logger.warning(
            "%d GPUs are visible, and one process uses one of them. To use them all, add --launch ddp, or fsdp2 to "
            "divide the base among them (a script: accelerate launch)",
            visible,
        )
