"""Which of the machine's GPUs is this process' own: a process of ours uses one."""

import functools
import logging
import os

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


@functools.cache  # once a process
def say_unused_gpus() -> None:
    """Where more GPUs are visible than this process uses and no other process uses them: how to use them all."""
    visible, processes = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1"))
    if visible > 1 and processes == 1:
        logger.warning(
            "%d GPUs are visible, and one process uses one of them. To use them all, write a config with "
            "`accelerate config --config_file FILE` and add --launch FILE (a script: accelerate launch)",
            visible,
        )
