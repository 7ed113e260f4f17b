"""Attention over a tree in one piece and in pieces: what each sees, and what becomes of one that fails."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from preftune.models import flex_tree
from preftune.models.flex_tree import block_mask, flex_applies, flex_tree_attention, kind_of, probe, squares
from preftune.models.packing import tree_attention
from preftune.models.prefix_tree import PIECE, SQUARE, Attended, Tree, build_tree, lay_out, rounded
from preftune.models.tree_pieces import attention_in_pieces

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_tree, "_failed", {})


def whole_tree(rows: int = 6, length: int = 150, seed: int = 0) -> Tree:
    """Rows of unequal length, each two of which share their first third, in one block."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (rows, length), generator=g)
    ids[1::2, : length // 3] = ids[: rows // 2 * 2 : 2, : length // 3]
    mask = torch.ones_like(ids)
    for i in range(rows):
        mask[i, length - 7 * i :] = 0
    return Tree(lay_out(ids.numpy(), mask.numpy() > 0, ids.numel()), CPU)


def squared(tree: Tree) -> Tree:
    """Two squares at least."""
    return Tree(tree.layout.rounded(SQUARE, 2 * SQUARE), CPU)


def inputs(n: int) -> list[Any]:
    return [torch.randn(1, heads, n, 16, requires_grad=True) for heads in (4, 2, 2)]


def results(attend: Callable[..., torch.Tensor], tree: Tree, window: int | None) -> list[torch.Tensor]:
    """The output and the inputs' gradients."""
    torch.manual_seed(1)
    given = inputs(len(tree.ids_N))
    out = attend(*given, tree, window)
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), given)]


def by_blocks(query: Any, key: Any, value: Any, tree: Tree, window: int | None) -> torch.Tensor:
    found, _ = tree_attention(torch.nn.Module(), query, key, value, None, sliding_window=window, tree=tree)
    return found.transpose(1, 2)


def by_flex(query: Any, key: Any, value: Any, tree: Tree, window: int | None) -> torch.Tensor:
    return flex_tree_attention(query, key, value, tree, window, None)


def seen(tree: Tree, window: int | None) -> torch.Tensor:
    """Who sees whom, [N, N]: the definition."""
    index = torch.arange(len(tree.ids_N))
    found = (index <= index[:, None]) & (index[:, None] < tree.end_N)
    return found if not window else found & (tree.depth_N[:, None] - tree.depth_N < window)


@pytest.mark.parametrize("window", [None, 4, 100])
def test_pieces_see_what_the_blocks_see(window: int | None) -> None:
    for tree in (whole_tree(rows=8), rounded(whole_tree(rows=5), 128)):
        assert len(tree.ids_N) > PIECE
        for found, expected in zip(
            results(attention_in_pieces, tree, window), results(by_blocks, tree, window), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_mask_of_a_piece_grows_with_the_tree() -> None:
    """One of N x N numbers would: 10 GB at 50,000 tokens."""

    def elements(rows: int) -> int:
        return sum(mask.numel() for _, _, mask in whole_tree(rows, 400).pieces(None, torch.float32))

    assert elements(32) < 2.1 * elements(16)
    longest = max(mask.shape[-1] for _, _, mask in whole_tree(32, 400).pieces(None, torch.float32))
    assert longest <= PIECE + 400


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 4, 100])
def test_flex_attention_sees_what_the_blocks_see(window: int | None) -> None:
    """On the CPU without compiling it; on a GPU the packed forward runs it compiled."""
    for tree in (whole_tree(), rounded(whole_tree(), SQUARE), squared(whole_tree(2, 20))):
        with torch.no_grad():
            q, k, v = inputs(len(tree.ids_N))
            found, expected = by_flex(q, k, v, tree, window), by_blocks(q, k, v, tree, window)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not flex_tree._failed


@pytest.mark.checklist("D6")
@pytest.mark.parametrize("window", [None, 1, 40, 128, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_d06_squares_hold_every_pair_and_full_ones_nothing_else(window: int | None, seed: int) -> None:
    tree = rounded(whole_tree(rows=4 + seed, length=100 + 90 * seed, seed=seed), SQUARE)
    q = len(tree.ids_N) // SQUARE
    pairs = seen(tree, window).view(q, SQUARE, q, SQUARE)
    some, all_ = (torch.from_numpy(each) for each in squares(tree.layout.depth_N, tree.layout.end_N, window))
    assert torch.equal(all_, pairs.all(3).all(1))
    held = pairs.any(3).any(1)
    assert bool((held <= (some | all_)).all()) and not bool((some & all_).any())
    if window is None:
        assert torch.equal(held, some | all_)
    # what a window leaves in without need is little
    assert int((some | all_).sum()) <= int(held.sum()) + 2 * q
    mine = block_mask(tree, window)
    theirs = create_block_mask(lambda _b, _h, i, j: seen(tree, window)[i, j], None, None, q * SQUARE, q * SQUARE, "cpu")
    if window is None:
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert mine.shape == theirs.shape and mine.BLOCK_SIZE == theirs.BLOCK_SIZE


class _Broken(torch.autograd.Function):
    """A kernel whose forward is right, and whose backward asks for more memory than the card has."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")


def kernel(fails: str, call: int) -> Callable[..., torch.Tensor]:
    """FlexAttention as it is on a GPU, but for one call that fails in its forward or in its backward."""
    calls = {"forward": 0, "backward": 0}

    def run(given: list[torch.Tensor], tree: Tree, window: int | None, scale: float | None) -> torch.Tensor:
        out = attention_in_pieces(given[0], given[1], given[2], tree, window, scale=scale)
        which = "backward" if torch.is_grad_enabled() else "forward"
        calls[which] += 1
        if which != fails or calls[which] != call:
            return out
        if fails == "forward":
            raise RuntimeError("out of resource: shared memory")
        return _Broken.apply(out)

    return run


@pytest.mark.parametrize("call", [1, 10])
@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_kernel_that_fails_changes_no_number(
    fails: str, call: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flex_tree, "_flex", kernel(fails, call))
    tree = whole_tree()
    expected = results(by_blocks, tree, None)
    for batch in range(1, 13):
        for found, other in zip(results(by_flex, tree, None), expected, strict=True):
            torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)
        assert bool(flex_tree._failed) == (batch >= call)
    (record,) = caplog.records
    assert "shared memory" in record.getMessage() and "4 heads over 2 of width 16" in record.getMessage()
    kind = next(iter(flex_tree._failed))[1]
    flex_tree._failed["cuda", kind] = "as on the CPU"
    assert not flex_applies(torch.device("cuda"), kind)
    assert flex_applies(torch.device("cuda"), kind._replace(width=8))


def test_memory_that_is_short_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(flex_tree, "_flex", full)
    q, k, v = inputs(len(whole_tree().ids_N))
    with pytest.raises(torch.OutOfMemoryError):
        by_flex(q, k, v, whole_tree(), None)
    assert not flex_tree._failed


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda out: out, None),
        (lambda out: out * 1.3, "its numbers differ by 0.3"),
        (lambda out: out + out.detach() * (1e-4 if torch.is_grad_enabled() else 0), None),
        (lambda out: out * (1 if not torch.is_grad_enabled() else 2) / 1, "its numbers differ by 1 of"),
        (_Broken.apply, "shared memory"),
    ],
)
def test_the_probe_tries_the_backward_too(
    spoil: Callable[[torch.Tensor], torch.Tensor], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward that fails is found before there is a batch, and so is one that is wrong."""
    monkeypatch.setattr(flex_tree, "flex_applies", lambda device, *kinds: not flex_tree._failed)
    right = kernel("never", 0)
    monkeypatch.setattr(flex_tree, "_flex", lambda *given: spoil(right(*given)))
    query, key, value = inputs(3)
    kind = kind_of(query, key, value)
    probe(Attended(None, kind, 0.3), CPU)
    assert list(flex_tree._failed) == ([] if why is None else [("cpu", kind)])
    assert why is None or why in flex_tree._failed["cpu", kind]


def test_uncompiled_it_is_an_error_and_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole score matrix, made in silence, is what nobody must wait for."""
    tree = whole_tree()
    query, key, value = (each.detach() for each in inputs(len(tree.ids_N)))
    with pytest.raises(RuntimeError, match=r"torch\.compile is switched off"):
        flex_tree._by_kernel(query, key, value, block_mask(tree, None))


def test_layouts_are_those_of_a_loop_over_tokens() -> None:
    g = numpy.random.default_rng(0)
    for _ in range(60):
        b, length = int(g.integers(1, 9)), int(g.integers(1, 14))
        ids = torch.from_numpy(g.integers(0, 4, (b, length)))
        lengths, left = g.integers(1, length + 1, b), bool(g.integers(2))
        mask = torch.from_numpy((numpy.arange(length) < lengths[:, None])[:, :: -1 if left else 1].copy())
        limit = [None, 5, 10_000][int(g.integers(3))]
        tree = build_tree(ids, mask.long(), limit, [None, 4][int(g.integers(2))])
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        for i, row in enumerate(rows):
            nodes = tree.index_BL[i][mask[i]]
            assert tree.ids_N[nodes].tolist() == row
            assert tree.depth_N[nodes].tolist() == list(range(len(row)))
            # each token's ancestors, and no other, are its row's tokens before it
            last = int(nodes[-1])
            assert seen(tree, None)[last].nonzero().flatten().tolist() == nodes.tolist()
        if limit == 10_000:
            prefixes = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
            assert len(tree.blocks) > 1 or len(tree.ids_N) == len(prefixes)
        assert [start for start, _ in tree.blocks] == [0, *(stop for _, stop in tree.blocks[:-1])]
