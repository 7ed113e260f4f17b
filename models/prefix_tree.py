"""The prefix tree of a batch: its distinct tokens, who sees whom, and the blocks in which attention runs.

A tree is laid out in the processor's memory, with numpy, from rows that lie there too; what a forward needs of it goes
to the device in one copy, so that a GPU is never asked, and never waited for, between two forwards.

Legend of shape suffixes: B rows, L padded positions, M real tokens of all rows, N distinct tokens, T tokens of a block
or piece, C those tokens and their ancestors, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_attention import Run
from .transfer import to_device

Integers = NDArray[numpy.int64]

BLOCK_TOKENS, BLOCK_ROWS = 448, 4
"""At most so many tokens, and about so many rows, make one attention block: smaller ones repeat more prefixes, larger
ones mask more. For rows of 200 tokens 384 to 512 tokens measured best, for rows of 65 256 to 320."""


ROUND_TO = 32
"""On a CPU the number of tokens is a multiple of this: for every new number oneDNN compiles each product anew (some
milliseconds, some memory that it keeps), which costs more than a few tokens too many."""


SQUARE = 128
"""Where attention takes a tree in one piece, it does so in squares of so many tokens. The tree is filled up to a
multiple of them, and to two at least: a size of one is another kernel to torch.compile."""


TRIAL_SQUARES = 11
"""Squares of a tree with which attention is tried: torch.compile takes sizes that are equal at first for one, and no
model has so many heads."""


PIECE = 512
"""Tokens of a piece: where a tree has no kernel of its own, so many attend at once to their common ancestors."""


class Piece(NamedTuple):
    """Tokens that attend together: those from `start` to `stop`. `ancestor`: where tokens before `start` lie that any
    of them sees."""

    start: int
    stop: int
    ancestor: Integers


@dataclass(frozen=True)
class Layout:
    """A prefix tree in the processor's memory; what the fields mean stands at `Tree`'s properties of the same names.

    mask_BL: whether a token counts. whole: attention takes it in one piece.
    """

    ids_N: Integers
    depth_N: Integers
    end_N: Integers
    blocks: tuple[tuple[int, int], ...]
    index_BL: Integers
    mask_BL: NDArray[numpy.bool_]
    whole: bool = False

    def rounded(self, multiple: int, least: int = 0) -> "Layout":
        """With tokens at the end that nobody sees and whose states nobody reads, up to a multiple of so many.

        They repeat the first token, at its own place: a token that no row has there, as padding's, may have an
        embedding of zeros, whose norm has no gradient, and a zero times that is not a zero.
        """
        n = len(self.ids_N)
        missing = max(n + -n % multiple, least) - n
        if not missing:
            return self
        ids_N, depth_N = (numpy.concatenate([each, each[:1].repeat(missing)]) for each in (self.ids_N, self.depth_N))
        end_N = numpy.concatenate([self.end_N, numpy.arange(n + 1, n + missing + 1)])
        return replace(self, ids_N=ids_N, depth_N=depth_N, end_N=end_N, blocks=(*self.blocks, (n, n + missing)))

    def pieces(self) -> Iterator[Piece]:
        """The blocks, long ones cut: no piece is longer than `PIECE`, whatever the tree's or a row's length."""
        for begin, end in self.blocks:
            for start in range(begin, end, PIECE):
                ancestor = numpy.flatnonzero(self.end_N[begin:start] > start) + begin
                yield Piece(start, min(start + PIECE, end), ancestor)


@dataclass(frozen=True)
class Tree:
    """The distinct tokens of a batch in depth-first order, on a device.

    Attributes:
        layout: the tree in the processor's memory.
        device: where its tensors are.
        masks: what was already made: masks by block, window and dtype; the runs.
        attended: what every attention layer was that this tree has reached.
    """

    layout: Layout
    device: torch.device
    masks: dict[Any, Any] = field(default_factory=dict)
    attended: "list[Attended]" = field(default_factory=list)

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        """ids_N, depth_N, end_N; node_M and place_M: where the rows' tokens lie in the tree, and in the flat rows."""
        layout = self.layout
        place_M = numpy.flatnonzero(layout.mask_BL)
        found = (layout.ids_N, layout.depth_N, layout.end_N, layout.index_BL.reshape(-1)[place_M], place_M)
        sizes = [len(each) for each in found]
        return to_device(numpy.concatenate(found), self.device).split(sizes)

    @property
    def ids_N(self) -> Tensor:
        """Token ids."""
        return self._tensors[0]

    @property
    def depth_N(self) -> Tensor:
        """Position of each token in the rows that hold it."""
        return self._tensors[1]

    @property
    def end_N(self) -> Tensor:
        """Index after the last descendant: j is i's ancestor or i itself when j <= i < end[j]."""
        return self._tensors[2]

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each attention block; no token's ancestors lie outside its block."""
        return self.layout.blocks

    @property
    def index_BL(self) -> Tensor:
        """Where each padded position's token lies (0 where there is padding)."""
        return to_device(self.layout.index_BL, self.device)

    def spread(self, hidden_NH: Tensor) -> Tensor:
        """The tokens' states to their places in the rows [B, L, H]; zero where there is padding.

        Only real tokens are read: padding that read the first token would make one index of thousands, which the
        backward adds up one after the other.
        """
        node_M, place_M = self._tensors[3:]
        b, length = self.layout.mask_BL.shape
        flat = hidden_NH[node_M]
        if len(place_M) < b * length:
            flat = hidden_NH.new_zeros(b * length, hidden_NH.size(-1)).index_copy(0, place_M, flat)
        return flat.view(b, length, -1)

    def mask(self, block: tuple[int, int], window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [1, 1, T, T] of a block: 0 for ancestors within the layer's sliding window, else -inf."""
        key = (block, window, dtype)
        if key not in self.masks:
            index_T = torch.arange(*block, device=self.device)
            self.masks[key] = self._additive(index_T, index_T, window, dtype)
        return self.masks[key]

    def pieces(self, window: int | None, dtype: torch.dtype) -> list[tuple[Piece, Tensor | None, Tensor]]:
        """The pieces, where the keys of each lie [C] (None: from its start to its stop), and its mask [1, 1, T, C]."""
        key = ("pieces", window, dtype)
        if key not in self.masks:
            found: list[tuple[Piece, Tensor | None, Tensor]] = []
            for piece in self.layout.pieces():
                index_T = key_C = torch.arange(piece.start, piece.stop, device=self.device)
                if len(piece.ancestor):
                    key_C = torch.cat([to_device(piece.ancestor, self.device), index_T])
                seen = self._additive(index_T, key_C, window, dtype)
                found.append((piece, key_C if len(piece.ancestor) else None, seen))
            self.masks[key] = found
        return self.masks[key]

    def _additive(self, index_T: Tensor, key_C: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        seen_TC = (key_C <= index_T[:, None]) & (index_T[:, None] < self.end_N[key_C])
        if window:
            seen_TC &= self.depth_N[index_T][:, None] - self.depth_N[key_C] < window
        blank_TC = torch.zeros(seen_TC.shape, dtype=dtype, device=seen_TC.device)
        return blank_TC.masked_fill_(~seen_TC, float("-inf"))[None, None]

    def runs(self) -> tuple[Run, ...]:
        """The blocks, those together that follow one another and look the same: independent rows of one length, say."""
        if "runs" not in self.masks:
            runs: list[Run] = []
            for start, stop in self.blocks:
                last = runs[-1] if runs else (0, 0, -1)
                if last[2] == stop - start and self._alike(last[0], start, stop - start):
                    runs[-1] = (last[0], stop, last[2])
                else:
                    runs.append((start, stop, stop - start))
            self.masks["runs"] = tuple(runs)
        return self.masks["runs"]

    def _alike(self, a: int, b: int, t: int) -> bool:
        end_N, depth_N = self.layout.end_N, self.layout.depth_N
        same_ends = numpy.array_equal(end_N[a : a + t] + (b - a), end_N[b : b + t])
        return same_ends and numpy.array_equal(depth_N[a : a + t], depth_N[b : b + t])

    def longest_block(self) -> int:
        """Tokens of the longest block."""
        return max(stop - start for start, stop in self.blocks)


class Kind(NamedTuple):
    """What an attention kernel is compiled for: dtype, query heads, key-value heads, widths of keys and of values."""

    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    value_width: int


class Attended(NamedTuple):
    """An attention layer that a tree has reached: its sliding window (None: there is none), its kind, and by what its
    scores are multiplied (None: one over the root of the width)."""

    window: int | None
    kind: Kind
    scale: float | None


def build_tree(
    input_ids_BL: Tensor, attention_mask_BL: Tensor, block_tokens: int | None = None, apart_tokens: int | None = None
) -> Tree:
    """The prefix tree of the rows' real tokens, on their device; the arguments are those of `lay_out`."""
    rows = Rows.of(input_ids_BL, attention_mask_BL)
    return Tree(lay_out(rows.ids_BL, rows.mask_BL, block_tokens, apart_tokens), input_ids_BL.device)


def rounded(tree: Tree, multiple: int = ROUND_TO) -> Tree:
    """The tree with tokens at its end that nobody meets (`Layout.rounded`); the same one each time it is asked for."""
    key = ("rounded", multiple)
    if key not in tree.masks:
        layout = tree.layout.rounded(multiple)
        tree.masks[key] = None if layout is tree.layout else Tree(layout, tree.device)
    return tree.masks[key] or tree


def lay_out(
    ids_BL: Integers,
    mask_BL: NDArray[numpy.bool_],
    block_tokens: int | None = None,
    apart_tokens: int | None = None,
) -> Layout:
    """The prefix tree of the rows' real tokens.

    Rows in sorted order share their prefix with the row before or with none, so laying out each row's new tokens after
    the last one's gives the depth-first order directly.

    Args:
        ids_BL: token ids [B, L], padded on either side.
        mask_BL: whether a token counts [B, L]; every row holds at least one.
        block_tokens: a block is closed before the row that would make it longer; None: by the rows' mean length.
        apart_tokens: with so many tokens a block is also closed before a row that shares nothing with it.
    """
    rows = [ids[kept] for ids, kept in zip(ids_BL, mask_BL, strict=True)]
    capacity = sum(map(len, rows))
    if block_tokens is None:
        block_tokens = min(BLOCK_TOKENS, BLOCK_ROWS * -(-capacity // len(rows)))
    # numbers written with their largest byte first are in order as text is
    keys = [row.astype(">u4").tobytes() for row in rows]
    ids_N, depth_N, end_N = (numpy.empty(capacity, numpy.int64) for _ in range(3))
    paths: list[Integers] = [ids_N] * len(rows)
    blocks: list[tuple[int, int]] = []
    previous = path = ids_N[:0]
    start = total = 0
    for i in sorted(range(len(rows)), key=keys.__getitem__):
        row = rows[i]
        shared = _shared(row, previous)
        full = total - start + len(row) - shared > block_tokens
        if len(path) and (full or (apart_tokens and not shared and total - start >= apart_tokens)):
            blocks.append((start, total))
            start, shared = total, 0
        stop = total + len(row) - shared
        path = numpy.concatenate([path[:shared], numpy.arange(total, stop)])
        ids_N[total:stop], depth_N[total:stop] = row[shared:], numpy.arange(shared, len(row))
        end_N[path] = stop
        previous, paths[i], total = row, path, stop
    blocks.append((start, total))
    index_BL = numpy.zeros(ids_BL.shape, numpy.int64)
    index_BL[mask_BL] = numpy.concatenate(paths)
    return Layout(ids_N[:total], depth_N[:total], end_N[:total], tuple(blocks), index_BL, mask_BL)


def _shared(a: Integers, b: Integers) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = numpy.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class Rows:
    """Padded rows in the processor's memory, and the trees that were made of them.

    Whoever takes several forwards of the same rows hands one of these to each, so that they share a tree and its masks.

    Args:
        ids_BL: token ids [B, L], padded on either side.
        mask_BL: whether a token counts [B, L].
        layouts: of trees by `key` that outlive these rows; None: none do.
        key: what these rows are among those.
    """

    def __init__(
        self,
        ids_BL: Integers,
        mask_BL: NDArray[numpy.bool_],
        layouts: dict[Any, Layout] | None = None,
        key: object = None,
    ) -> None:
        self.ids_BL, self.mask_BL = ids_BL, mask_BL
        self._layouts: dict[Any, Layout] = {} if layouts is None else layouts
        self._key = key
        self._trees: dict[tuple[torch.device, bool], Tree] = {}

    @classmethod
    def of(cls, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> "Rows":
        """Read from where they are: on a GPU, once its queue is done."""
        if input_ids_BL.device.type == "cpu":
            return cls(input_ids_BL.numpy(), attention_mask_BL.numpy() != 0)
        both = torch.stack([input_ids_BL, attention_mask_BL.to(input_ids_BL.dtype)]).cpu().numpy()
        return cls(both[0], both[1] != 0)

    def tree(self, device: torch.device, *, whole: bool, squares: int = 2) -> Tree:
        """Their tree on that device.

        Args:
            whole: attention takes it in one piece, so it is one block, of whole squares.
            squares: of those at least so many.
        """
        if (device, whole) not in self._trees:
            key = (self._key, whole)
            if key not in self._layouts:
                found = lay_out(self.ids_BL, self.mask_BL, self.ids_BL.size if whole else None)
                self._layouts[key] = replace(found.rounded(SQUARE, squares * SQUARE), whole=True) if whole else found
            self._trees[device, whole] = Tree(self._layouts[key], device)
        return self._trees[device, whole]
