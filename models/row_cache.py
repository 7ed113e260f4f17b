"""Keys and values of the rows that are being decoded, in buffers made once.

All rows end in the same column: a row's last token stands in column `stop - 1`, its first one wherever its length puts
it. So one write serves all rows, distances between columns are distances between tokens (sliding windows hold), and a
row that joins later is copied in with its end where the others end.

Legend of shape suffixes: B rows, H key-value heads, C columns, D head dimension, P prompt positions.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class RowCache(Cache):
    """A transformers cache for `rows` rows of at most `width` tokens.

    Columns are used from left to right; at the buffers' end what is in use moves back to their beginning, so buffers
    twice as wide as a row are moved once in `width` steps.

    Attributes:
        rows: rows in use, the first ones.
        start, stop: the columns in use: [start, stop).
    """

    def __init__(self, rows: int, width: int, layers: int) -> None:
        self.rows, self.columns = rows, 2 * width
        self.start, self.stop = 0, 0
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def make_room(self) -> None:
        """One more column is needed."""
        if self.stop < self.columns:
            return
        kept = self.stop - self.start
        for layer in self._layers():
            for buffer in (layer.keys, layer.values):
                assert buffer is not None
                buffer[: self.rows, :, :kept] = buffer[: self.rows, :, self.start : self.stop].clone()
        self.start, self.stop = 0, kept

    def insert(self, slots: Sequence[int] | Tensor, prefilled: Cache, source: Tensor) -> None:
        """Copy prompts into rows.

        Args:
            slots: the rows to fill.
            prefilled: a cache of left-padded prompts, not wider than `stop` allows; the first one sets `stop`.
            source: for each slot its prompt's place in `prefilled`.
        """
        width = prefilled.layers[0].keys.shape[2]  # type: ignore[union-attr]
        if self.stop < width:
            if self.stop:
                raise ValueError(f"a prompt of {width} tokens after shorter ones, expected the longest first")
            self.stop = width
        span = slice(self.stop - width, self.stop)
        for layer, prompt in zip(self._layers(), prefilled.layers, strict=True):
            found: Any = prompt
            layer.reserve(found.keys)
            assert layer.keys is not None and layer.values is not None
            layer.keys[slots, :, span] = found.keys[source]
            layer.values[slots, :, span] = found.values[source]

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on, as the first ones, in the given order (ascending)."""
        for layer in self._layers():
            for buffer in (layer.keys, layer.values):
                assert buffer is not None
                buffer[: len(rows), :, self.start : self.stop] = buffer[rows, :, self.start : self.stop]
        self.rows = len(rows)

    def _layers(self) -> "list[_Layer]":
        return self.layers  # type: ignore[return-value]


class _Layer(CacheLayerMixin):
    """One layer's buffers [B, H, C, D]; what a forward writes becomes the newest column."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def reserve(self, like: Tensor) -> None:
        if self.keys is None:
            shape = (self.cache.rows, like.shape[1], self.cache.columns, like.shape[3])
            self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
            self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.reserve(key_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache = self.cache
        assert self.keys is not None and self.values is not None
        self.keys[: cache.rows, :, cache.stop] = key_states[:, :, 0]
        self.values[: cache.rows, :, cache.stop] = value_states[:, :, 0]
        seen = slice(cache.start, cache.stop + 1)
        return self.keys[: cache.rows, :, seen], self.values[: cache.rows, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.stop - self.cache.start

    def get_max_length(self) -> int:
        return -1
