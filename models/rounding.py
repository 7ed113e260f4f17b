"""fp32 weights to 16 bits without a bias: what a small adapter says survives its merge.

A base's weights lie on the 16-bit grid, and most of a LoRA change is smaller than half a step of it: rounded to the
nearest, w + d is w again, always, and a merged policy has lost a part of its training. Measured on an SFT of
SmolLM2-135M (1,486 tokens): 2.753 nats a token in fp32, 2.757 in bf16 with the adapter beside, 2.787 rounded to the
nearest, 2.754 rounded like this; KL from the fp32 policy 0.0011, 0.0042 and 0.0010.
"""

import torch
from torch import Tensor

# Kept bits of fp32's mantissa that a format does not have.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
# The plastic number's powers, as steps of a fraction (Roberts' R2 sequence): along a row, along a column and in between
# the thresholds are spread evenly, so that errors cancel in the sums of a product sooner than random ones would.
_STEP_ROW, _STEP_COLUMN = 0.7548776662466927, 0.5698402909980532


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in that dtype, each value rounded up or down so that the expectation over positions is the value.

    Which way is a function of the position alone: the same weights give the same result, and a value that the dtype can
    hold stays what it is. fp32 comes back as it is. `weight` (fp32) may be written over.

    Args:
        weight: of at least one dimension.
    """
    if dtype not in _DROPPED:
        return weight.to(dtype)
    bits = _DROPPED[dtype]
    size, device = 1 << bits, weight.device
    matrix = weight.float().contiguous().reshape(-1, weight.shape[-1])
    row_O, column_I = (torch.arange(count, device=device, dtype=torch.int64) for count in matrix.shape)
    row_O = ((row_O * int(_STEP_ROW * size)) % size).int()
    column_I = ((column_I * int(_STEP_COLUMN * size)) % size).int()
    threshold_OI = (row_O[:, None] + column_I[None]).bitwise_and_(size - 1)
    # fp32 as an integer: adding up to a whole step and cutting off the rest rounds the magnitude
    cut = threshold_OI.add_(matrix.view(torch.int32)).bitwise_and_(-size).view(torch.float32)
    return cut.to(dtype).reshape(weight.shape)
