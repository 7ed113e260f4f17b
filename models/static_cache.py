"""Keys and values that stay where they are, for rows decoded on a GPU.

A row's tokens stand from column 0 on, whatever the others' lengths: nothing is moved when rows come and go, and no
buffer is made anew while they grow. So a step reads and writes the same memory every time, as a CUDA graph must, and
where it writes is a tensor's matter, not the host's.

Legend of shape suffixes: B rows, R rows that come in, H key-value heads, C columns, W columns of a prompt, D head
dimension.
"""

import torch
from torch import Tensor

from .prefill import Prefilled


class StaticCache:
    """Buffers for `rows` rows of at most `columns` tokens, made when the first prompts come in.

    Attributes:
        rows: rows in use, the first ones. columns: of each buffer.
        seen: columns that a step reads, the first ones; the caller's, who knows the longest row.
    """

    def __init__(self, rows: int, layers: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns, self.seen = rows, columns, columns
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.layers = layers
        self.column_C, self.row_B = torch.arange(columns, device=device), torch.arange(rows, device=device)
        self.at_B = self.row_B

    def insert(self, slots: Tensor, prefilled: Prefilled, source: Tensor) -> None:
        """Copy prompts into rows: `slots` the rows, `source` for each its prompt's place in `prefilled`."""
        length_R = prefilled.length_B[source]
        width = int(length_R.max())
        column_W = self.column_C[:width]
        # the prompts are padded on the left; what goes round comes behind the row's end, where it must only be finite
        from_RW = (column_W + (width - length_R)[:, None]) % width
        outside_RW = column_W >= length_R[:, None]
        for index in range(self.layers):
            keys, values = prefilled.layer(index, source, width)
            if len(self.buffers) == index:
                self.buffers.append((self._buffer(keys), self._buffer(values)))
            for buffer, each in zip(self.buffers[index], (keys, values), strict=True):
                place = from_RW[:, None, :, None].expand(-1, each.size(1), -1, each.size(3))
                buffer[slots, :, :width] = each.gather(2, place).masked_fill_(outside_RW[:, None, :, None], 0)

    def _buffer(self, like_RHWD: Tensor) -> Tensor:
        # zeros, not whatever was in memory: a hidden column counts 0 times its value, and 0 times NaN is NaN
        return like_RHWD.new_zeros(self.rows, like_RHWD.size(1), self.columns, like_RHWD.size(3))

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on, as the first ones, in the given order."""
        for pair in self.buffers:
            for buffer in pair:
                buffer[: len(rows)] = buffer[rows]
        self.rows = len(rows)

    def mask(self, length_B: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of one more token a row, which is the last of its `length` [B, seen]: 0, or -inf.
        That token's keys and values are what `put` writes from now on."""
        self.at_B = length_B - 1
        hidden_BC = self.column_C[: self.seen] >= length_B[:, None]
        return torch.zeros(hidden_BC.shape, dtype=dtype, device=hidden_BC.device).masked_fill_(hidden_BC, float("-inf"))

    def put(self, index: int, keys_BHD: Tensor, values_BHD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest token of every row into a layer; the columns that are seen there [B, H, seen, D]."""
        keys, values = (buffer[: self.rows] for buffer in self.buffers[index])
        row_B = self.row_B[: self.rows]
        keys[row_B, :, self.at_B] = keys_BHD.to(keys.dtype)
        values[row_B, :, self.at_B] = values_BHD.to(values.dtype)
        return keys[:, :, : self.seen], values[:, :, : self.seen]
