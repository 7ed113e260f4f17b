"""Attention over a whole prefix tree at once with FlexAttention: for GPUs, where one kernel beats many small ones.

FlexAttention (Dong et al., arXiv 2412.05496) skips the squares of the score matrix that its block mask leaves empty, so
the tree needs no cutting into blocks and no prefix is repeated. Which squares those are follows from the tree's
intervals: no [N, N] matrix is ever made.

It may not run: a head dimension whose backward needs more shared memory than the card has, a driver without a compiler.
So each kind of attention is tried before the first batch, forward and backward, against attention in pieces
(`probe`). What fails there, or later, in a forward or in a backward, is attended to in pieces from then on, and the log
says so once.

Legend of shape suffixes: N tokens, H query heads, K key-value heads, D head dimension, Q rows and S columns of squares.
"""

import functools
import logging
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import seams
from .prefix_tree import SQUARE, TRIAL_SQUARES, Attended, Integers, Kind, Rows, Tree
from .transfer import to_device
from .tree_pieces import attention_in_pieces
from .trial import difference, difference_in_words

with seams.importing(seams.FLEX_ATTENTION):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

FoundT = TypeVar("FoundT")

logger = logging.getLogger(__name__)

_failed: dict[tuple[str, Kind], str] = {}
"""Why FlexAttention does not run, by device type and kind."""


def kind_of(query_1HND: Tensor, key_1KND: Tensor, value_1KND: Tensor) -> Kind:
    """What a kernel for these is compiled for."""
    device, dtype = query_1HND.device.type, query_1HND.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return Kind(dtype, query_1HND.size(1), key_1KND.size(1), query_1HND.size(-1), value_1KND.size(-1))


def flex_applies(device: torch.device, *kinds: Kind) -> bool:
    """Whether trees on this device are attended to in one piece, by layers of these kinds."""
    return device.type == "cuda" and not any((device.type, kind) in _failed for kind in kinds)


def flex_tree_attention(
    query_1HND: Tensor, key_1KND: Tensor, value_1KND: Tensor, tree: Tree, window: int | None, scale: float | None
) -> Tensor:
    """softmax(scale * q k') v over each token's ancestors within the window [1, H, N, D].

    Where FlexAttention fails, in this forward or in its backward, the numbers are those of attention in pieces.
    """
    dtype = kind_of(query_1HND, key_1KND, value_1KND).dtype
    query, key, value = (each.to(dtype) for each in (query_1HND, key_1KND, value_1KND))
    return _TreeAttention.apply(query, key, value, tree, window, scale)


def probe(attended: Attended, device: torch.device) -> None:
    """Try a layer's attention on a small tree, forward and backward, unless its kind has failed already.

    Its numbers, too: a kernel that is wrong here is not used.
    """
    window, kind, scale = attended
    if not flex_applies(device, kind):
        return
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        tree = _small_tree(device)
        generator = torch.Generator().manual_seed(0)
        n, (dtype, heads, key_heads, width, value_width) = len(tree.ids_N), kind
        sizes = ((heads, width), (key_heads, width), (key_heads, value_width), (heads, value_width))
        *inputs, grad = (
            to_device(torch.randn(1, n, count, size, generator=generator), device).to(dtype).transpose(1, 2)
            for count, size in sizes
        )
        found = _attempt(inputs, tree, window, scale), *_attempt_backward(inputs, tree, window, scale, grad)
        if not flex_applies(device, kind):
            return
        expected = _in_pieces(inputs, tree, window, scale), *_backward(_in_pieces, inputs, tree, window, scale, grad)
        for one, other in zip(found, expected, strict=True):
            why = difference_in_words(difference(one.flatten(-2), other.flatten(-2)), dtype, device)
            if why is not None:
                _give_up(device, kind, f"its numbers {why}")
                return


def _small_tree(device: torch.device) -> Tree:
    """Two rows that share their beginning."""
    ids_BL = numpy.arange(2 * SQUARE).reshape(2, SQUARE)
    ids_BL[1, : SQUARE // 2] = ids_BL[0, : SQUARE // 2]
    return Rows(ids_BL, numpy.ones(ids_BL.shape, bool)).tree(device, whole=True, squares=TRIAL_SQUARES)


class _TreeAttention(torch.autograd.Function):
    """Its backward runs the kernel's forward once more, some hundredths of a layer's time, so that nothing but the
    inputs is kept, and a backward that fails is one that can be made in another way."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.tree, ctx.window, ctx.scale = tree, window, scale
        return _attempt([query, key, value], tree, window, scale)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: autograd's own takes any arguments
        ctx: Any, grad_1HND: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.saved_tensors)
        return *_attempt_backward(inputs, ctx.tree, ctx.window, ctx.scale, grad_1HND), None, None, None


_Attend = Callable[[list[Tensor], Tree, int | None, float | None], Tensor]


def _in_pieces(inputs: list[Tensor], tree: Tree, window: int | None, scale: float | None) -> Tensor:
    return attention_in_pieces(inputs[0], inputs[1], inputs[2], tree, window, scale=scale)


def _attempt(inputs: list[Tensor], tree: Tree, window: int | None, scale: float | None) -> Tensor:
    """By FlexAttention without a gradient, or else in pieces."""
    # whether an input has a gradient, or might have one, would be another graph
    inputs = [each.detach() for each in inputs]
    with torch.no_grad():
        found = _or_give_up(inputs, lambda: _flex(inputs, tree, window, scale))
        return _in_pieces(inputs, tree, window, scale) if found is None else found


def _attempt_backward(
    inputs: list[Tensor], tree: Tree, window: int | None, scale: float | None, grad_1HND: Tensor
) -> tuple[Tensor, ...]:
    """The inputs' gradients by FlexAttention, or else in pieces."""
    found = _or_give_up(inputs, lambda: _backward(_flex, inputs, tree, window, scale, grad_1HND))
    return _backward(_in_pieces, inputs, tree, window, scale, grad_1HND) if found is None else found


def _backward(
    attend: _Attend, inputs: list[Tensor], tree: Tree, window: int | None, scale: float | None, grad_1HND: Tensor
) -> tuple[Tensor, ...]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    with torch.enable_grad():
        out = attend(leaves, tree, window, scale)
    return torch.autograd.grad(out, leaves, grad_1HND)


def _or_give_up(inputs: list[Tensor], run: Callable[[], FoundT]) -> FoundT | None:
    """What `run` gives; None where the kernel has failed, now or before."""
    device, kind = inputs[0].device, kind_of(*inputs)
    if (device.type, kind) in _failed:
        return None
    try:
        with torch.autocast(device.type, enabled=False):
            return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own errors have no common class
        said = str(error).strip() or type(error).__name__
        _give_up(device, kind, said.splitlines()[0][:300])
        return None


def _give_up(device: torch.device, kind: Kind, why: str) -> None:
    _failed[device.type, kind] = why
    logger.warning(
        "FlexAttention does not run here for %d heads over %d of width %d in %s (%s): trees are attended to in pieces",
        kind.heads, kind.key_heads, kind.width, kind.dtype, why,
    )  # fmt: skip


def _flex(inputs: list[Tensor], tree: Tree, window: int | None, scale: float | None) -> Tensor:
    query, key, value = inputs
    grouped = query.shape[1] != key.shape[1]
    mask = block_mask(tree, window)
    if not query.is_cuda:
        return _output(flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped))
    run = _compiled(kind_of(query, key, value), window, None if scale is None else repr(scale), torch.is_grad_enabled())
    return run(query, key, value, mask)


def _output(found: Any) -> Tensor:
    return found


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: str | None = None) -> Tensor:
    """What is compiled. Run as it stands it would make the whole score matrix, in silence but for a warning.

    scale: as text, because torch.compile takes a number for a variable, and the kernel wants a constant.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is switched off, or has left it to run uncompiled")
    factor, grouped = None if scale is None else float(scale), query.shape[1] != key.shape[1]
    return _output(flex_attention(query, key, value, block_mask=mask, scale=factor, enable_gqa=grouped))


def compile_fully(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As one graph for every number of tokens; one graph too many (`recompile_limit`) is an error, not a slow call."""
    return torch.compile(function, dynamic=True, fullgraph=True)


@functools.cache
def _compiled(kind: Kind, window: int | None, scale: str | None, gradient: bool) -> Callable[..., Tensor]:
    """A kernel of its own for each kind of attention, mask and mode. torch.compile counts graphs by code object, so one
    that were shared would be at its limit with two models or two masks."""
    name = f"tree_attention_{kind.heads}_{kind.key_heads}_{kind.width}_{window}_{gradient}"
    code: CodeType = _by_kernel.__code__.replace(co_name=name)
    return compile_fully(FunctionType(code, globals(), name, (scale,)))


def block_mask(tree: Tree, window: int | None) -> BlockMask:
    """Which squares of the [N, N] score matrix hold a pair of a token and one of its ancestors within the window."""
    key = ("flex", window)
    if key not in tree.masks:
        tree.masks[key] = _block_mask(tree, window)
    return tree.masks[key]


def _block_mask(tree: Tree, window: int | None) -> BlockMask:
    seams.require(seams.FLEX_ATTENTION)
    depth_N, end_N = tree.depth_N, tree.end_N

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ancestor = (key <= query) & (query < end_N[key])
        return ancestor if not window else ancestor & (depth_N[query] - depth_N[key] < window)

    some_QS, all_QS = squares(tree.layout.depth_N, tree.layout.end_N, window)
    orders = [_order(each) for each in (some_QS, all_QS, some_QS.T, all_QS.T)]
    flat = numpy.concatenate([each.ravel() for order in orders for each in order]).astype(numpy.int32)
    q, n = len(some_QS), len(tree.layout.ids_N)
    parts = iter(to_device(flat, tree.device).split([q, q * q] * len(orders)))
    tables = [next(parts).view(1, 1, *shape) for _ in orders for shape in ((q,), (q, q))]
    return BlockMask((n, n), *tables, BLOCK_SIZE=(SQUARE, SQUARE), mask_mod=seen)


def squares(
    depth_N: Integers, end_N: Integers, window: int | None
) -> tuple[NDArray[numpy.bool_], NDArray[numpy.bool_]]:
    """Squares [Q, S] in which some queries (rows) see some keys (columns), and those in which all see all.

    The first are exact without a window; with one, a few may hold no pair: the kernel looks at each pair in them.
    """
    q = -(-len(end_N) // SQUARE)
    end_ST, depth_ST = (
        numpy.pad(each, (0, q * SQUARE - len(each)), mode="edge").reshape(q, SQUARE) for each in (end_N, depth_N)
    )
    first_Q = numpy.arange(q) * SQUARE
    before_QS = first_Q < first_Q[:, None]
    last_end_S = end_ST.max(1)
    some_QS = before_QS & (last_end_S > first_Q[:, None])
    all_QS = before_QS & (end_ST.min(1) >= first_Q[:, None] + SQUARE)
    if window:
        # the smallest depth among a square's queries that can be below the last of its keys
        reach_QT = numpy.minimum.accumulate(depth_ST, 1)
        last_QS = numpy.clip(last_end_S - first_Q[:, None], 1, SQUARE) - 1
        some_QS &= numpy.take_along_axis(reach_QT, last_QS, 1) - depth_ST.max(1) < window
        all_QS &= depth_ST.max(1)[:, None] - depth_ST.min(1) < window
    return (some_QS & ~all_QS) | numpy.eye(q, dtype=bool), all_QS


def _order(held_QS: NDArray[numpy.bool_]) -> tuple[Integers, Integers]:
    """How many squares of each row are held [Q], and which: their columns first [Q, S]."""
    return held_QS.sum(1), numpy.argsort(~held_QS, axis=1, kind="stable")
