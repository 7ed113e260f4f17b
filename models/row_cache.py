"""Keys and values of the rows that are being decoded.

All rows end in the same column: a row's last token stands in column `stop - 1`, its first one wherever its length puts
it. So one write serves all rows, distances between columns are distances between tokens (sliding windows hold), and a
row that joins later is copied in with its end where the others end.

Legend of shape suffixes: B rows, H key-value heads, C columns, D head dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from . import seams
from .prefill import Prefilled

with seams.importing(seams.CACHE_LAYER):
    from transformers.cache_utils import CacheLayerMixin

ROOM = 16
"""Columns that buffers have to spare, at most, when they are made. A forward sees whole buffers, because products of a
part of one would copy it first; so more room means more columns that are read for nothing, and less that buffers are
made anew more often."""


class RowCache(Cache):
    """A transformers cache for `rows` rows, all of whose columns a forward sees: the caller's mask hides those before a
    row's first token and after its last.

    Attributes:
        rows: rows in use, the first ones.
        columns: of each buffer. stop: the first one that is free.
    """

    def __init__(self, rows: int, layers: int) -> None:
        seams.require(seams.CACHE_LAYER, _Layer)
        self.rows, self.columns, self.stop = rows, 0, 0
        super().__init__(layers=[_Layer(self, index) for index in range(layers)])

    def make_room(self, kept: int) -> None:
        """One more column is needed; the longest row has `kept` tokens here, and nothing before them is kept."""
        if self.stop < self.columns:
            return
        start, self.columns = self.stop - kept, _round_up(kept)
        for layer in self._layers():
            layer.keys, layer.values = (
                _widened(each[: self.rows, :, start : self.stop], self.columns)
                for each in (layer.keys, layer.values)
                if each is not None
            )
        self.stop = kept

    def seen(self, length_B: Tensor) -> Tensor:
        """Where each row's tokens stand [B, C], the one that comes into column `stop` among its `length`."""
        column_C = torch.arange(self.columns, device=length_B.device)
        return (column_C > self.stop - length_B[:, None]) & (column_C <= self.stop)

    def mask(self, length_B: Tensor, dtype: torch.dtype) -> Tensor:
        """The same to add to scores [B, C]: 0, or -inf."""
        seen_BC = self.seen(length_B)
        return torch.zeros(seen_BC.shape, dtype=dtype, device=seen_BC.device).masked_fill_(~seen_BC, float("-inf"))

    def insert(self, slots: Tensor, prefilled: Prefilled, source: Tensor) -> None:
        """Copy prompts into rows.

        Args:
            slots: the rows to fill.
            prefilled: where the prompts are; none is longer than `stop` allows, and the first ones set `stop`.
            source: for each slot its prompt's place in `prefilled`.
        """
        width = int(prefilled.length_B[source].max())
        if self.stop < width:
            if self.stop:
                raise ValueError(f"a prompt of {width} tokens after shorter ones, expected the longest first")
            self.stop, self.columns = width, _round_up(width)
        span = slice(self.stop - width, self.stop)
        for index, layer in enumerate(self._layers()):
            keys, values = prefilled.layer(index, source, width)
            layer.reserve(keys, values)
            assert layer.keys is not None and layer.values is not None
            layer.keys[slots, :, span] = keys
            layer.values[slots, :, span] = values

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on, as the first ones, in the given order (ascending)."""
        for layer in self._layers():
            for buffer in (layer.keys, layer.values):
                assert buffer is not None
                buffer[: len(rows)] = buffer[rows]
        self.rows = len(rows)

    def buffers(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, C, D] of a layer."""
        layer = self._layers()[index]
        assert layer.keys is not None and layer.values is not None
        return layer.keys[: self.rows], layer.values[: self.rows]

    def put(self, index: int, keys_BHD: Tensor, values_BHD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest column of a layer; all that the rows have there [B, H, C, D]."""
        keys_BHCD, values_BHCD = self.buffers(index)
        keys_BHCD[:, :, self.stop] = keys_BHD
        values_BHCD[:, :, self.stop] = values_BHD
        return keys_BHCD, values_BHCD

    def _layers(self) -> "list[_Layer]":
        return self.layers  # type: ignore[return-value]


def _round_up(columns: int) -> int:
    return columns // ROOM * ROOM + ROOM


def _widened(buffer_BHCD: Tensor, columns: int) -> Tensor:
    # zeros, not whatever was in memory: a hidden column counts 0 times its value, and 0 times NaN is NaN
    return F.pad(buffer_BHCD, (0, 0, 0, columns - buffer_BHCD.size(2)))


class _Layer(CacheLayerMixin):
    """One layer's buffers [B, H, C, D]; what a forward writes becomes the newest column."""

    is_sliding = False

    def __init__(self, cache: RowCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def reserve(self, keys: Tensor, values: Tensor) -> None:
        """Buffers for keys and values like these, which need not be as wide as one another."""
        if self.keys is None:
            self.keys, self.values = (
                like.new_zeros(self.cache.rows, like.shape[1], self.cache.columns, like.shape[3])
                for like in (keys, values)
            )
            self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.reserve(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.put(self.index, key_states[:, :, 0], value_states[:, :, 0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns, 0

    def get_seq_length(self) -> int:
        return self.cache.stop

    def get_max_length(self) -> int:
        return -1
