"""From the processor's memory to a device, without waiting for what the device is doing."""

import numpy
import torch
from torch import Tensor


def to_device(array: numpy.ndarray | Tensor, device: torch.device) -> Tensor:
    """The same numbers on that device; on the CPU the same memory.

    A copy from pageable memory waits for the device's queue. From page-locked memory it joins the queue, and PyTorch
    keeps that memory until it has been read.
    """
    tensor = torch.from_numpy(array) if isinstance(array, numpy.ndarray) else array
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
